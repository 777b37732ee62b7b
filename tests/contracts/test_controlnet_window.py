"""A ControlNet is run in the steps of its guidance window, and in no other; the picture is the same."""

import diffusers
import pytest
import torch
from legs import only_patched

CLASSES = [
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
]


def count_calls(net) -> list:
    """Grows by one with each call of a model."""
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    return calls


def run(pipe, **options):
    from stock_pipelines import call_options

    return pipe(**call_options(pipe, generator=torch.Generator().manual_seed(0), **options)).images


@only_patched
@pytest.mark.parametrize("name", CLASSES)
def test_a_controlnet_outside_of_its_window_is_not_run(name):
    from stock_pipelines import stock_pipeline

    pipe = stock_pipeline(name)
    nets, steps = count_calls(pipe.controlnet), count_calls(pipe.unet)
    always = run(pipe)
    assert len(nets) == len(steps) > 0
    for window in ({"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}):
        nets.clear(), steps.clear()
        picture = run(pipe, **window)
        assert 0 < len(nets) < len(steps)
        assert abs(picture - always).max() > 1e-4


@only_patched
def test_each_of_several_controlnets_has_its_window():
    from stock_pipelines import IMAGE, base, controlnet

    pipe = diffusers.StableDiffusionXLControlNetPipeline(**base().components, controlnet=[controlnet(), controlnet()])
    calls = [count_calls(net) for net in pipe.controlnet.nets]
    window = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
    run(pipe, image=[IMAGE, IMAGE], controlnet_conditioning_scale=[1.0, 1.0], **window)
    assert [len(counted) for counted in calls] == [2, 2]


@only_patched
@pytest.mark.parametrize("guess_mode", [False, True])
def test_still_the_picture_that_a_scale_of_zero_gives(guess_mode):
    from stock_pipelines import stock_pipeline

    pipe = stock_pipeline("StableDiffusionXLControlNetPipeline")
    window = {"control_guidance_start": 0.9, "control_guidance_end": 0.91, "guess_mode": guess_mode}
    outside = run(pipe, **window)
    for parameter in pipe.controlnet.parameters():
        parameter.data.zero_()
    assert abs(run(pipe, guess_mode=guess_mode) - outside).max() < 1e-5
