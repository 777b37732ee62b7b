"""Noise is added at one timestep, as inpainting does in each step, without a copy to the device."""

import pytest
import torch
from legs import LEG, only_patched
from recorded import SyncRecorder, places

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]

pytestmark = only_patched


@pytest.mark.parametrize("begin_index", [None, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_copy_at_one_timestep(name, begin_index):
    schedulers = [LEG.scheduler(name) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
        if begin_index is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin_index)
    sample, noise = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 1, 4, 8, 8)
    timestep = schedulers[0].timesteps[3:4]
    expected = schedulers[0].add_noise(sample, noise, timestep)
    with SyncRecorder() as recorder:
        noisy = schedulers[1].add_noise(recorder.on_device(sample), recorder.on_device(noise), timestep)
    assert places(recorder.events) == {}
    assert torch.equal(noisy.host, expected)
