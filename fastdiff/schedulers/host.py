"""The host side of a schedule: timesteps, sigmas and every coefficient stay on the CPU, whatever the device.

A stock scheduler waits for the device only because part of its schedule lives there. Kept on the host, the
stock `step` reads its coefficients as 0-dimensional CPU tensors, which enter device kernels as plain
arguments: no copy, no wait, the same dtype rules. So no `step` is copied here; stock methods are wrapped, and
the few that would move a table to the device are asked for their weights instead (see `linear.py`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import SchedulerMixin

from ..identity import StandIn, stands_in_for
from .linear import StepWeights, plan_step_weights
from .modes import noise_without_wait

T = TypeVar("T", bound=type)
S = TypeVar("S", bound="HostSchedule")


class HostSchedule(metaclass=StandIn):
    """Mixin over a stock scheduler: what that has not. `keeps_schedule_on_host` wraps what it has."""

    _stock: type[SchedulerMixin]
    # Attributes in which the stock class keeps device tensors from one step to the next.
    _history: tuple[str, ...] = ()

    @classmethod
    def from_stock(cls: type[S], scheduler: SchedulerMixin) -> S:
        """Make a fast scheduler with the configuration and the state of a stock one, which it leaves alone.

        Args:
            scheduler: an instance of the stock class itself. A fast one is returned as it is.

        Raises:
            TypeError: if it is of another class; a subclass may override what this class relies on.
        """
        if isinstance(scheduler, cls):
            return scheduler
        if type(scheduler) is not cls._stock:
            raise TypeError(
                f"{cls.__qualname__}.from_stock takes a {cls._stock.__name__}, not a "
                f"{type(scheduler).__qualname__}. Use from_config(scheduler.config) for its options."
            )
        fast = cls.__new__(cls)
        for name, value in copy.deepcopy(vars(scheduler)).items():
            # Tables have one dimension; what has more is a sample of a call under way.
            is_table = isinstance(value, torch.Tensor) and value.ndim <= 1
            fast.__dict__[name] = value.cpu() if is_table else value
        return fast

    def step_weights(self, timesteps: torch.Tensor | None = None, **step_kwargs: Any) -> list[StepWeights]:
        """The rest of the schedule as weights for `guided_step`, which compiles once for all steps.

        Call it before the loop, after `set_timesteps` (and `set_begin_index`). The scheduler does not change.

        Args:
            timesteps: the timesteps that the loop will run, (steps,); None for the rest of the schedule.
            **step_kwargs: what `step` would get beside `model_output`, `timestep`, `sample` and `generator`.

        Raises:
            ValueError: before `set_timesteps`, or with `thresholding` or `clip_sample`, which are not linear.
        """
        return plan_step_weights(self, self._history, timesteps, **step_kwargs)

    def _host_timestep(self, timestep: Any) -> Any:
        """Bring a timestep given on the device to the host. That waits, as any reading of it would."""
        return timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep


FAST_CLASSES: dict[type, Any] = {}
"""Each stock class with its fast class, filled by `keeps_schedule_on_host`."""


def keeps_schedule_on_host(stock: type[SchedulerMixin]) -> Callable[[T], T]:
    """Class decorator: wrap the stock methods that touch the schedule; diffusers reads their signatures."""

    def convert(cls: Any) -> Any:
        cls._stock = stock
        for name, wrap in _WRAPPERS.items():
            if hasattr(stock, name):
                setattr(cls, name, functools.wraps(getattr(stock, name))(wrap(getattr(stock, name))))
        FAST_CLASSES[stock] = stands_in_for(stock)(cls)
        return cls

    return convert


def _wrap_set_timesteps(stock: Callable) -> Callable:
    signature = inspect.signature(stock)

    def set_timesteps(self, num_inference_steps=None, device=None, *args, **kwargs):
        given = signature.bind(self, num_inference_steps, device, *args, **kwargs).arguments
        timesteps, sigmas = given.get("timesteps"), given.get("sigmas")
        if sigmas is not None and not all(map(math.isfinite, sigmas)):
            raise ValueError(f"`sigmas` must be finite, got {list(sigmas)}.")
        try:
            return stock(self, num_inference_steps, None, *args, **kwargs)
        except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            if (reason := _explain_schedule(num_inference_steps, timesteps, sigmas)) is None:
                raise
            raise ValueError(reason) from error

    return set_timesteps


def _explain_schedule(num_inference_steps: Any, timesteps: Any, sigmas: Any) -> str | None:
    """What is wrong with the arguments of a stock `set_timesteps` that raised, or None where its own error says it."""
    if num_inference_steps is None and timesteps is None and sigmas is None:
        return "`num_inference_steps` is missing: pass the number of denoising steps, 1 or more."
    if isinstance(num_inference_steps, int) and num_inference_steps < 1:
        return f"`num_inference_steps` must be 1 or more, got {num_inference_steps}."
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is not None and len(values) == 0:
            return f"`{name}` is empty: pass one value per step, in descending order."
    return None


def _wrap_step(stock: Callable) -> Callable:
    def step(self, model_output, timestep, sample, *args, **kwargs):
        timestep = self._host_timestep(timestep)
        with noise_without_wait(kwargs.get("generator"), model_output.device), _explaining(timestep, self.timesteps):
            return stock(self, model_output, timestep, sample, *args, **kwargs)

    return step


def _wrap_index_for_timestep(stock: Callable) -> Callable:
    def index_for_timestep(self, timestep, schedule_timesteps=None):
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps.cpu()
        timestep = self._host_timestep(timestep)
        with _explaining(timestep, schedule):
            return stock(self, timestep, schedule)

    return index_for_timestep


@contextmanager
def _explaining(timestep: Any, schedule: torch.Tensor) -> Iterator[None]:
    """Say what is wrong with a timestep that stock cannot look up; what it takes, such as a foreign one, is taken."""
    try:
        yield
    except (IndexError, AttributeError, TypeError) as error:
        found = schedule == timestep
        if isinstance(found, torch.Tensor) and found.any():
            raise
        ends = f"from {schedule[0]} to {schedule[-1]}" if len(schedule) else "none"
        raise ValueError(
            f"timestep {timestep!r} is not in the schedule: pass an element of `scheduler.timesteps`, "
            f"which has {len(schedule)}, {ends}."
        ) from error


def _wrap_mixing(stock: Callable) -> Callable:
    """For `add_noise` and `get_velocity`, which mix a sample and noise with two weights per timestep."""
    signature = inspect.signature(stock)

    def mix(self, *args, **kwargs):
        _, sample, noise, timesteps = signature.bind(self, *args, **kwargs).args
        # Asked on the host about a unit sample and a unit noise, the stock method answers with its weights.
        unit = torch.eye(2, dtype=sample.dtype)
        weights = stock(self, unit[:1], unit[1:], self._host_timestep(timesteps))
        if len(weights) in (1, *sample.shape[:1]) and bool((weights == weights[:1]).all()):
            of_sample, of_noise = weights[0]
        else:
            weights = weights.to(sample.device, non_blocking=True)
            shape = (-1, *[1] * (sample.ndim - 1))
            of_sample, of_noise = weights[:, 0].reshape(shape), weights[:, 1].reshape(shape)
        # In stock the weights have a dimension each, so they promote the noise; 0-dimensional ones do not.
        noise = noise.to(torch.promote_types(sample.dtype, noise.dtype))
        return of_sample * sample + of_noise * noise

    return mix


_WRAPPERS = {
    "set_timesteps": _wrap_set_timesteps,
    "step": _wrap_step,
    "index_for_timestep": _wrap_index_for_timestep,
    "add_noise": _wrap_mixing,
    "get_velocity": _wrap_mixing,
}
