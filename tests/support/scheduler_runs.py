"""What the scheduler tests share: the stock classes that have a fast one, and a run of one."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastdiff
from fastdiff.schedulers import FAST_CLASSES

EIGHT = sorted(FAST_CLASSES, key=lambda stock_class: stock_class.__name__)
eight = pytest.mark.parametrize("stock_class", EIGHT, ids=lambda cls: cls.__name__)
SHAPE = (2, 3, 4, 4)


def fast_of(stock_class: type) -> type:
    """The fast class of a stock one."""
    return getattr(fastdiff, f"Fast{stock_class.__name__}")


def takes(scheduler, method: str, parameter: str) -> bool:
    """Whether a method of a scheduler has a parameter, as diffusers asks."""
    return parameter in inspect.signature(getattr(scheduler, method)).parameters


def linear_options(stock_class: type) -> dict:
    """Options without clipping, which some classes do by default."""
    return {"clip_sample": False} if takes(stock_class, "__init__", "clip_sample") else {}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(scaled: torch.Tensor) -> torch.Tensor:
    """A stand-in for the UNet: smooth, bounded, not symmetric."""
    return torch.tanh(scaled + noise(*scaled.shape[1:], seed=7).to(scaled))


def denoise(scheduler, steps: int = 20, dtype=torch.float32, seed: int = 1, **step_kwargs) -> torch.Tensor:
    """Run a schedule of `steps` with the stand-in; returns the samples after each step, (steps, *SHAPE)."""
    scheduler.set_timesteps(steps)
    if takes(scheduler, "step", "generator"):
        step_kwargs["generator"] = torch.Generator().manual_seed(seed)
    sample, samples = (noise(*SHAPE) * scheduler.init_noise_sigma).to(dtype), []
    for timestep in scheduler.timesteps:
        model_output = model(scheduler.scale_model_input(sample, timestep))
        if scheduler.config.get("variance_type"):
            model_output = torch.cat([model_output, model_output], dim=1)
        sample = scheduler.step(model_output, timestep, sample, **step_kwargs, return_dict=False)[0]
        samples.append(sample)
    return torch.stack(samples)
