"""`set_timesteps` copies nothing back from the device."""

import pytest
import torch
from legs import LEG
from recorded import places
from support.sync_recorder import SyncRecorder

# The first three have a fast class; for the others fastdiff keeps the stock one.
WITH_A_FAST_CLASS = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"]
OTHERS = [
    "CMStochasticIterativeScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
]


@pytest.mark.parametrize("name", WITH_A_FAST_CLASS + (OTHERS if LEG.patched else []))
def test_nothing_comes_back_from_the_device(name):
    expected, scheduler = LEG.scheduler(name), LEG.scheduler(name)
    expected.set_timesteps(10)
    with SyncRecorder() as recorder:
        scheduler.set_timesteps(10, device="cuda")
    assert places(event for event in recorder.waits() if event.name != "host to device") == {}
    assert torch.equal(scheduler.sigmas, expected.sigmas)


def test_euler_with_continuous_timesteps_waits_for_none_of_them():
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler = LEG.scheduler("EulerDiscreteScheduler", **options)
    with SyncRecorder() as recorder:
        scheduler.set_timesteps(10, device="cuda")
    assert len(recorder.waits()) <= 1
