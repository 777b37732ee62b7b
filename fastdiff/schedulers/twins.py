"""The fast schedulers: stock classes whose schedule stays on the host."""

from __future__ import annotations

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

from .host import FAST_CLASSES, HostSchedule, keeps_schedule_on_host
from .modes import ScalarsOnHost


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

@keeps_schedule_on_host(LCMScheduler)
class FastLCMScheduler(HostSchedule, LCMScheduler):
    """`LCMScheduler` that never waits for the device."""

@keeps_schedule_on_host(TCDScheduler)
class FastTCDScheduler(HostSchedule, TCDScheduler):
    """`TCDScheduler` that never waits for the device."""

@keeps_schedule_on_host(UniPCMultistepScheduler)
class FastUniPCMultistepScheduler(HostSchedule, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` that never waits for the device.

    The stock updates take their coefficients to the device and solve a linear system there, a wait each time.
    Here the same code works its coefficients out on the host.
    """

    _history = ("model_outputs", "last_sample")

    def multistep_uni_p_bh_update(self, *args, **kwargs) -> torch.Tensor:
        """Predict the next sample; as stock."""
        with ScalarsOnHost():
            return super().multistep_uni_p_bh_update(*args, **kwargs)

    def multistep_uni_c_bh_update(self, *args, **kwargs) -> torch.Tensor:
        """Correct the present sample; as stock."""
        with ScalarsOnHost():
            return super().multistep_uni_c_bh_update(*args, **kwargs)


def fast_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The fast twin of a stock scheduler, with its configuration and state.

    Args:
        scheduler: any scheduler.

    Returns:
        A fast scheduler, or `scheduler` itself if it is a fast one, of a class without a fast twin, or of a
        subclass of a stock class.
    """
    twin = FAST_CLASSES.get(type(scheduler))
    return scheduler if twin is None else twin.from_stock(scheduler)
