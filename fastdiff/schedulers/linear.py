"""A step as a weighted sum of tensors, with the weights read off the stock step itself.

Apart from clipping, every step is linear in the model output, the sample, the noise and the tensors kept from
earlier steps. Run on unit vectors on the host, the stock code therefore answers with its weights: no formula
is copied, and what is left for the device is one sum, the same for all steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .modes import NoiseIs


class StepWeights(NamedTuple):
    """The weights of one step, 0-dimensional float32 CPU tensors.

    Attributes:
        sums: one tuple for the next sample, then one for each tensor of the history; each holds the weights
            of the model output, the sample and the tensors of the history.
        noise: the weight of fresh noise in the next sample; 0 where the step draws none.
    """

    sums: tuple[tuple[torch.Tensor, ...], ...]
    noise: torch.Tensor

    def empty_history(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The history before the first step: zeros of the sample's shape, in float32."""
        return tuple(torch.zeros_like(sample, dtype=torch.float32) for _ in self.sums[1:])


def guided_step(
    noise_pred: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    sample: torch.Tensor,
    weights: StepWeights,
    history: tuple[torch.Tensor, ...],
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Classifier-free guidance and the scheduler's step: no host state, one graph under `torch.compile`.

    Args:
        noise_pred: the model's output for the unconditional batch, then the conditional, (2 * batch, ...).
        guidance_scale: the guidance scale; a 0-dimensional tensor serves every value with one graph.
        sample: the latents of this step, (batch, ...).
        weights: this step's entry of `scheduler.step_weights()`.
        history: what the step before returned; `weights.empty_history(sample)` before the first.
        noise: standard normal noise, (batch, ...), for a scheduler with `weights.noise` other than 0.

    Returns:
        The next latents, in the dtype of `noise_pred`, and the history for the next step, in float32.
    """
    unconditional, conditional = noise_pred.chunk(2)
    model_output = unconditional + guidance_scale * (conditional - unconditional)
    terms = [term.to(torch.float32) for term in (model_output, sample, *history)]
    sums: list[Any] = [sum(w * term for w, term in zip(row, terms, strict=True)) for row in weights.sums]
    following, *kept = sums
    if noise is not None:
        following = following + weights.noise * noise.to(torch.float32)
    return following.to(noise_pred.dtype), tuple(kept)


def plan_step_weights(
    scheduler: Any, history: tuple[str, ...], timesteps: torch.Tensor | None, **step_kwargs: Any
) -> list[StepWeights]:
    """Run a copy of `scheduler` through the rest of its schedule on unit vectors.

    Args:
        scheduler: a scheduler whose schedule is on the CPU.
        history: the names of the attributes that hold tensors, or lists of them, from step to step.
        timesteps: the timesteps of the steps, 1-dimensional; None for the rest of the schedule.
        **step_kwargs: passed on to `step`.

    Raises:
        ValueError: if `thresholding` or `clip_sample` makes the step nonlinear.
    """
    for option in ("thresholding", "clip_sample"):
        if scheduler.config.get(option):
            raise ValueError(f"`{option}=True` makes the step nonlinear: use `step`, or configure it False.")
    probe = copy.deepcopy(scheduler)
    probe.is_scale_input_called = True  # the model is not run, so its input needs no scaling
    slots = len(list(_read(probe, history)))
    units = torch.eye(3 + slots, dtype=torch.float64).unsqueeze(1)
    model_output, sample, noise, *past = units
    plan = []
    if timesteps is None:
        done = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        timesteps = scheduler.timesteps[done:]
    for timestep in timesteps:
        _write(probe, history, past)
        with NoiseIs(noise):
            following = probe.step(model_output, timestep, sample, **step_kwargs, return_dict=False)[0]
        kept = [torch.zeros_like(following) if row is None else row for row in _read(probe, history)]
        table = torch.cat([following, *kept]).float()
        sums = tuple(tuple(scalar.clone() for scalar in (*row[:2], *row[3:])) for row in table)
        plan.append(StepWeights(sums, table[0, 2].clone()))
    return plan


def _read(scheduler: Any, names: Iterable[str]) -> Iterable[torch.Tensor | None]:
    for name in names:
        value = getattr(scheduler, name, None)
        yield from value if isinstance(value, list) else [value]


def _write(scheduler: Any, names: Iterable[str], units: Iterable[torch.Tensor]) -> None:
    """Put unit vectors in the place of the tensors; what is not there yet decides branches and stays away."""
    units = iter(units)
    for name in names:
        value = getattr(scheduler, name, None)
        if isinstance(value, list):
            setattr(scheduler, name, [next(units) for _ in value])
        else:
            unit = next(units)
            if value is not None:
                setattr(scheduler, name, unit)
