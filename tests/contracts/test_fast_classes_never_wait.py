"""No pipeline class of fastdiff waits for the device in its loop."""

import pytest
from legs import LEG
from recorded import place
from stock_pipelines import stock_pipeline, waits

CLASSES = [f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")]
CLASSES += [f"StableDiffusionXLControlNet{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")]


@pytest.mark.skipif(LEG.patched, reason="about fastdiff's classes")
@pytest.mark.parametrize("name", CLASSES)
def test_no_class_waits_in_its_loop(name):
    import fastdiff

    pipe = getattr(fastdiff, f"Fast{name}")(**stock_pipeline(name).components, fast="exact")
    pipe.set_progress_bar_config(disable=True)
    place(pipe)
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        pipe.scheduler = LEG.scheduler(scheduler, pipe.scheduler.config, clip_sample=False)
        assert waits(pipe)["loop"] == []
