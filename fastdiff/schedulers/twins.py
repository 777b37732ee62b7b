"""The fast schedulers: stock classes whose schedule stays on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from .host import _TWINS, HostSchedule, keeps_schedule_on_host
from .linear import weighted_sum


@keeps_schedule_on_host(EulerDiscreteScheduler)
class FastEulerDiscreteScheduler(HostSchedule, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` that never waits for the device."""


@keeps_schedule_on_host(EulerAncestralDiscreteScheduler)
class FastEulerAncestralDiscreteScheduler(HostSchedule, EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` that never waits for the device."""


@keeps_schedule_on_host(HeunDiscreteScheduler)
class FastHeunDiscreteScheduler(HostSchedule, HeunDiscreteScheduler):
    """`HeunDiscreteScheduler` that never waits for the device."""

    _history = ("prev_derivative", "sample")


@keeps_schedule_on_host(DPMSolverMultistepScheduler)
class FastDPMSolverMultistepScheduler(HostSchedule, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` that never waits for the device."""

    _history = ("model_outputs",)


@keeps_schedule_on_host(DDIMScheduler)
class FastDDIMScheduler(HostSchedule, DDIMScheduler):
    """`DDIMScheduler` that never waits for the device."""

    _reads_by_timestep = True


@keeps_schedule_on_host(LCMScheduler)
class FastLCMScheduler(HostSchedule, LCMScheduler):
    """`LCMScheduler` that never waits for the device."""

    _reads_by_timestep = True


@keeps_schedule_on_host(TCDScheduler)
class FastTCDScheduler(HostSchedule, TCDScheduler):
    """`TCDScheduler` that never waits for the device."""

    _reads_by_timestep = True


@keeps_schedule_on_host(UniPCMultistepScheduler)
class FastUniPCMultistepScheduler(HostSchedule, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` that never waits for the device.

    The stock updates take their coefficients to the device and solve a linear system there, a wait each time.
    Both are weighted sums, so the stock code is run on unit vectors on the host for the weights.
    """

    _history = ("model_outputs", "last_sample")

    def multistep_uni_p_bh_update(
        self, model_output, *args, sample=None, order=None, **kwargs
    ) -> torch.Tensor:
        """Predict the next sample; as stock."""
        stock = super().multistep_uni_p_bh_update
        if self.solver_p or args or kwargs:
            return stock(model_output, *args, sample=sample, order=order, **kwargs)

        def on_units(probe, sample, *_):
            return UniPCMultistepScheduler.multistep_uni_p_bh_update(probe, None, sample=sample, order=order)

        return self._as_sum(on_units, [sample], order)

    def multistep_uni_c_bh_update(
        self, this_model_output, *args, last_sample=None, this_sample=None, order=None, **kwargs
    ) -> torch.Tensor:
        """Correct the present sample; as stock."""
        stock = super().multistep_uni_c_bh_update
        if args or kwargs:
            given = {"last_sample": last_sample, "this_sample": this_sample, "order": order}
            return stock(this_model_output, *args, **given, **kwargs)

        def on_units(probe, last_sample, this_model_output):
            return UniPCMultistepScheduler.multistep_uni_c_bh_update(
                probe, this_model_output, last_sample=last_sample, this_sample=last_sample, order=order
            )

        return self._as_sum(on_units, [last_sample, this_model_output], order)

    def _as_sum(
        self, update: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], order: int
    ) -> torch.Tensor:
        terms = [*inputs, *self.model_outputs[-order:]]
        units = torch.eye(len(terms), dtype=torch.float64).unsqueeze(1)
        probe = copy.copy(self)
        probe.model_outputs = list(units[len(inputs) :])
        weights = update(probe, *units[: len(inputs)])[0].tolist()
        return weighted_sum(weights, terms).to(inputs[0].dtype)


def fast_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The fast twin of a stock scheduler, with its configuration and state.

    Args:
        scheduler: any scheduler.

    Returns:
        A fast scheduler, or `scheduler` itself if it is a fast one, of a class without a fast twin, or of a
        subclass of a stock class.
    """
    twin = _TWINS.get(type(scheduler))
    return scheduler if twin is None else twin.from_stock(scheduler)
