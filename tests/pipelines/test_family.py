"""The whole SDXL family: every feature of `family_features.py` in stock and fast, and what pipelines share."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file
from support.embedded import draw, storage_bytes
from support.family_features import (
    BEGIN,
    END,
    FAST_CLASSES,
    FEATURES,
    PROMPT,
    SIZE,
    Family,
    Feature,
    controlnet,
    draw_from,
    group_offload,
    lora,
    markdown,
    picture,
    with_controlnets,
)
from support.sync_recorder import SyncRecorder

import fastdiff
from fastdiff import FastConfig, NonFiniteError, PlanStep
from fastdiff.compiler.compilation import undo_compilation

WITHOUT_CONTROLNET = (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
README = Path(__file__).parents[2] / "fastdiff" / "pipelines" / "README.md"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f"{f.group}: {f.name}")
def test_feature(feature: Feature, assert_close):
    if feature.raises is not None:
        with pytest.raises((TypeError, ValueError), match=feature.raises):
            feature.run(Family("exact"))
        return
    expected = feature.run(Family())
    assert torch.isfinite(expected).all()
    assert_close(feature.run(Family("exact")), expected, feature.tolerance)


def test_readme_shows_the_same_list():
    text = README.read_text()
    if BEGIN not in text:
        pytest.skip("README.md has no feature table yet")
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == markdown(), "run: python tests/support/family_features.py fastdiff/pipelines/README.md"


# One UNet for all


def test_from_pipe_between_fast_classes_shares_components_plan_and_caches():
    base = Family("exact").load()
    pipes = [base, *(FAST_CLASSES[stock].from_pipe(base) for stock in WITHOUT_CONTROLNET)]
    control = FAST_CLASSES[StableDiffusionXLControlNetPipeline].from_pipe(base, controlnet=controlnet(base.unet))
    pipes += [control, FAST_CLASSES[StableDiffusionXLControlNetInpaintPipeline].from_pipe(control)]
    pipes.append(FAST_CLASSES[StableDiffusionXLPipeline].from_pipe(pipes[-1]))
    for pipe in pipes:
        assert pipe.unet is base.unet and pipe.vae is base.vae and pipe.scheduler is base.scheduler
        assert pipe.fast_config == base.fast_config
    assert pipes[-2].controlnet is control.controlnet
    assert type(control.controlnet) is fastdiff.FastControlNetModel


def test_stock_from_pipe_of_a_fast_pipeline_by_naming_its_models(assert_close):
    fast = Family("exact").load()
    expected = draw(fast)
    # Upstream's from_pipe compares classes by identity, so that models of a subclass have to be named.
    stock = StableDiffusionXLPipeline.from_pipe(fast, unet=fast.unet, vae=fast.vae)
    stock.set_progress_bar_config(disable=True)
    assert_close(draw(stock), expected)


def test_from_pipe_shares_the_weights_of_a_stock_controlnet():
    base = Family().load()
    source = Family().switch(base, StableDiffusionXLControlNetPipeline, controlnet=controlnet(base.unet))
    before = {name: p.data_ptr() for name, p in source.controlnet.named_parameters()}
    fast = FAST_CLASSES[StableDiffusionXLControlNetPipeline].from_pipe(source, fast="exact")
    assert {name: p.data_ptr() for name, p in fast.controlnet.named_parameters()} == before
    fast.explain()
    assert fast.controlnet.state_dict().keys() == source.controlnet.state_dict().keys()
    assert storage_bytes(fast.controlnet) == storage_bytes(source.controlnet)


def test_a_saved_controlnet_pipeline_loads_in_stock(tmp_path, assert_close):
    fast = with_controlnets(Family("exact"))
    expected = draw(fast, image=picture(3))
    fast.save_pretrained(tmp_path)
    stock = StableDiffusionXLControlNetPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(stock.controlnet) is ControlNetModel
    stock.set_progress_bar_config(disable=True)
    assert_close(draw(stock, image=picture(3)), expected)


def test_an_assigned_scheduler_gets_its_fast_twin():
    fast = Family("exact").load()
    fast.scheduler = LCMScheduler.from_config(fast.scheduler.config)
    assert isinstance(fast.scheduler, fastdiff.FastLCMScheduler)
    off = Family("off").load()
    off.scheduler = LCMScheduler.from_config(off.scheduler.config)
    assert type(off.scheduler) is LCMScheduler


def test_the_call_shows_the_arguments_of_its_stock_class():
    for stock, fast in FAST_CLASSES.items():
        assert inspect.signature(fast.__call__) == inspect.signature(stock.__call__)


def test_controlnet_computes_nothing_where_its_scale_is_zero(assert_close):
    pipe, computed = with_controlnets(Family("exact")), []
    pipe.controlnet.conv_in.register_forward_hook(lambda *_: computed.append(1))
    draw(pipe, image=picture(3), num_inference_steps=10, control_guidance_end=0.3)
    assert len(computed) == 3


def test_controlnet_sees_a_changed_prompt(assert_close):
    def callback(pipe, step, timestep, tensors):
        tensors["prompt_embeds"] *= 0.7
        return tensors

    call = {"image": picture(3), "callback_on_step_end": callback, "num_inference_steps": 4}
    call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    expected = draw(with_controlnets(Family()), **call)
    assert_close(draw(with_controlnets(Family("exact")), **call), expected)


# Recompilation


@pytest.fixture(scope="module")
def regional():
    """A text-to-image pipeline with compiled regions, and the others over the same components."""
    text = Family(FastConfig.preset("exact", compile="regional")).load()
    control = FAST_CLASSES[StableDiffusionXLControlNetPipeline].from_pipe(text, controlnet=controlnet(text.unet))
    image = FAST_CLASSES[StableDiffusionXLImg2ImgPipeline].from_pipe(text)
    for pipe in (control, image):
        pipe.set_progress_bar_config(disable=True)
    return text, image, control


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_nothing_recompiles_across_the_family(regional, assert_close):
    text, image, control = regional
    warm = draw(text), draw(control, image=picture(3)), image_to_image_call(image, strength=0.5)
    before = graphs()
    assert before > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        early = draw(control, image=picture(3), control_guidance_end=0.4, num_inference_steps=5)
        draw(control, image=picture(3), controlnet_conditioning_scale=0.3)
        for strength in (0.5, 0.8, 1.0):
            image_to_image_call(image, strength=strength)
        assert_close(draw(text), warm[0])
    assert graphs() == before
    expected = draw(with_controlnets(Family()), image=picture(3), control_guidance_end=0.4, num_inference_steps=5)
    assert_close(early, expected)


def image_to_image_call(pipe, **kwargs):
    return draw_from(pipe, **{"image": picture(), "num_inference_steps": 4, **kwargs})


def test_offloading_keeps_its_hooks_when_regions_are_compiled_and_taken_off():
    pipe = Family(FastConfig.preset("exact", compile="regional")).load()
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = pipe.unet.forward
    assert step_named(pipe, "compile").applied
    undo_compilation(pipe.unet)
    assert pipe.unet.forward is offloaded
    pipe.remove_all_hooks()
    group_offload(pipe)
    refused = PlanStep("compile", False, "group offload moves weights inside of the regions")
    assert step_named(pipe, "compile") == refused


def step_named(pipe, name: str) -> PlanStep:
    return next(step for step in pipe.plan if step.name == name)


# Waits


def place(pipe):
    pipe.explain()
    nets = [pipe.controlnet] if hasattr(pipe, "controlnet") else []
    SyncRecorder.place(pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, *nets)
    return pipe


@pytest.mark.parametrize("stock_class", FAST_CLASSES, ids=lambda cls: cls.__name__)
def test_loops_never_wait_and_the_finite_check_adds_no_wait(stock_class):
    config = FastConfig.preset("exact", compile="off")
    pipe = Family(config).load()
    if "ControlNet" in stock_class.__name__:
        pipe = Family(config).switch(pipe, stock_class, controlnet=controlnet(pipe.unet))
    else:
        pipe = Family(config).switch(pipe, stock_class)
    tensor = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    given = {"image": tensor, "mask_image": tensor[:, :1].round(), "control_image": tensor, "strength": 0.8}
    accepted = inspect.signature(stock_class.__call__).parameters
    call = {name: value for name, value in given.items() if name in accepted}
    call |= {"prompt": PROMPT, "num_inference_steps": 5, "output_type": "np"}
    torch.manual_seed(0)
    expected = pipe(**call).images
    place(pipe)
    with SyncRecorder() as recorder, recorder.watch(pipe):
        if hasattr(pipe, "controlnet"):
            pipe.controlnet.register_forward_pre_hook(lambda *_: setattr(recorder, "phase", "loop"))
        torch.manual_seed(0)
        images = pipe(**call).images
    assert recorder.waits("loop") == []
    # The picture itself; the check's copy is recorded too, as one that does not wait.
    assert [event.name for event in recorder.waits("after")] == ["device to host"]
    checks = [event for event in recorder.events if event.where.startswith("fastdiff/models/finite.py")]
    assert len(checks) == 2 and not any(event.wait for event in checks)
    assert abs(images - expected).max() < 1e-4


# Results that are not finite


def test_latents_that_are_not_finite_name_the_lora():
    pipe = Family("exact").load()
    lora(pipe)
    with torch.no_grad():
        next(p for name, p in pipe.unet.named_parameters() if "lora_B" in name).fill_(float("inf"))
    for output_type in ("latent", "pil", "np", "pt"):
        with pytest.raises(NonFiniteError, match=r"latents became NaN .*LoRA \(style active\)"):
            draw(pipe, output_type=output_type)


def test_an_overflowing_vae_is_told_apart():
    pipe = Family("exact").load()
    draw(pipe, output_type="pil")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    draw(pipe, output_type="latent")
    with pytest.raises(NonFiniteError, match="VAE decoded finite latents.*force_upcast"):
        draw(pipe, output_type="pil")


def test_a_result_left_on_the_device_is_reported_in_the_next_call():
    pipe = place(Family("exact").load())
    with SyncRecorder():
        torch.manual_seed(0)
        bias = pipe.vae.decoder.conv_out.bias
        kept = bias.host.clone()
        bias.host.fill_(float("nan"))
        pipe(PROMPT, num_inference_steps=1, output_type="pt", height=SIZE, width=SIZE)
        bias.host.copy_(kept)
        with pytest.warns(RuntimeWarning, match="previous call.*VAE"):
            pipe(PROMPT, num_inference_steps=1, output_type="pt", height=SIZE, width=SIZE)


def test_preset_off_checks_nothing():
    pipe = Family("off").load()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("inf"))
    assert draw(pipe, output_type="pil")


# Bad input


def test_bad_single_files_are_refused(tmp_path):
    load = fastdiff.FastStableDiffusionXLPipeline.from_single_file
    with pytest.raises(ValueError, match="not a .safetensors file"):
        load(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="cannot be found"):
        load(tmp_path / "model.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no whole SDXL checkpoint.*from_pretrained"):
        load(tmp_path / "other.safetensors")


def test_an_offloaded_stock_pipeline_is_refused():
    source = Family().load()
    source.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="offloaded.*remove_all_hooks"):
        fastdiff.FastStableDiffusionXLPipeline.from_pipe(source)
    with pytest.raises(ValueError, match="pass controlnet"):
        fastdiff.FastStableDiffusionXLControlNetPipeline.from_pipe(Family().load())


@pytest.mark.parametrize("stock_class", FAST_CLASSES, ids=lambda cls: cls.__name__)
def test_warmup_needs_no_pictures(stock_class):
    pipe = Family("exact").load()
    nets = {"controlnet": [controlnet(pipe.unet)] * 2} if "ControlNet" in stock_class.__name__ else {}
    Family("exact").switch(pipe, stock_class, **nets).warmup(sizes=[(SIZE, SIZE)])
