"""UniPC computes its coefficients on the host, so that no step waits for the device."""

import pytest
import torch
from legs import LEG, draw
from recorded import place, places, record


@pytest.mark.parametrize("solver_order", [2, 3])
def test_no_wait_in_the_loop(solver_order):
    options = {"num_inference_steps": 6}
    pipes = LEG.pipeline(), LEG.pipeline()
    for pipe in pipes:
        pipe.scheduler = LEG.scheduler("UniPCMultistepScheduler", pipe.scheduler.config, solver_order=solver_order)
    plain, pipe = pipes
    place(pipe)
    recorder, picture = record(pipe, **options)
    assert places(recorder.waits("loop")) == {}
    torch.manual_seed(0)
    expected = draw(plain, generator=None, output_type="np", **options)
    assert abs(picture - expected).max() < 1e-4
