"""All steps of a schedule, without the model, stock beside fast: what the host does between two calls of the UNet."""

from __future__ import annotations

import diffusers
import pytest
import torch
from interleave import run_pair

from fastdiff import fast_scheduler

SCHEDULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DDIMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
STEPS = 20


@pytest.mark.parametrize("timed", ["stock", "fast"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_steps(benchmark, pipes, scheduler, size, batch, device, dtype, timed, rounds):
    benchmark.group = f"{scheduler}, {STEPS} steps {size}x{size}, batch {batch}, {dtype}"
    stock = getattr(diffusers, scheduler).from_config(pipes["stock"].scheduler.config)
    schedulers = {"stock": stock, "fast": fast_scheduler(stock)}
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, size // 8, size // 8)
    latents, noise = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for _ in range(2)
    )

    def make(name: str):
        def run() -> torch.Tensor:
            chosen, sample = schedulers[name], latents
            chosen.set_timesteps(STEPS, device=device)
            for timestep in chosen.timesteps:
                chosen.scale_model_input(sample, timestep)
                sample = chosen.step(noise, timestep, sample, return_dict=False)[0]
            return sample

        return run

    run_pair(benchmark, make, timed, rounds, device)
