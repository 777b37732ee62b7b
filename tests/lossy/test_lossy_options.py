"""Guidance interval and deep-feature reuse: off by default, marked lossy, and each doing what it says."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLInpaintPipeline
from support.embedded import draw, load_fast, load_stock
from support.family_features import Family, draw_from, load_ip_adapter, mask, picture, with_controlnets
from support.ip_adapters import image_embeds

from fastdiff import FastConfig, PlanStep

STEPS = 8


def lossy(**options) -> FastConfig:
    return FastConfig.preset("exact", **options)


@pytest.fixture(scope="module")
def base():
    """An exact pipeline, over whose UNet the lossy ones run."""
    return load_fast("exact")


def over(pipe, **options):
    """A lossy pipeline over the components of another."""
    made = type(pipe).from_pipe(pipe, fast=lossy(**options))
    made.set_progress_bar_config(disable=True)
    return made


def batches_of(model: torch.nn.Module, run) -> list[int]:
    """The batch size of each run of a model within `run`."""
    sizes = []
    handle = model.register_forward_hook(lambda _, args, output: sizes.append(output.shape[0]))
    try:
        run()
    finally:
        handle.remove()
    return sizes


# The switch


def test_both_are_off_by_default_and_marked_lossy(base):
    config = FastConfig()
    assert config.guidance_interval is None and config.deep_cache_interval is None
    steps = {step.name: step for step in over(base, guidance_interval=(0.1, 0.8), deep_cache_interval=3).plan}
    interval, deep = steps["guidance_interval"], steps["deep_cache"]
    assert interval == PlanStep("guidance_interval", True, "guidance from 10% to 80% of the steps", lossless=False)
    assert deep == PlanStep("deep_cache", True, "5 inner blocks of the UNet in every 3. step", lossless=False)
    for step in base.plan:
        if step.name in steps and step.name in ("guidance_interval", "deep_cache"):
            assert not step.applied and not step.lossless


@pytest.mark.parametrize(
    "value", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.2,), [0.1, 0.8], 0.5, ("a", "b")]
)
def test_a_bad_guidance_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"FastConfig.guidance_interval must be None or a pair \(start, end\)"):
        FastConfig(guidance_interval=value)


@pytest.mark.parametrize("value", [1, 0, -2, 2.0, "2", True])
def test_a_bad_deep_cache_interval_is_refused(value):
    with pytest.raises(ValueError, match="FastConfig.deep_cache_interval must be None or an integer of 2 or more"):
        FastConfig(deep_cache_interval=value)


@pytest.mark.parametrize("clash", [{"compile": "full"}, {"cuda_graphs": True}])
def test_deep_cache_refuses_what_takes_the_unet_as_one_piece(clash):
    with pytest.raises(ValueError, match="deep_cache_interval does not go with"):
        FastConfig(deep_cache_interval=2, **clash)


def test_pipelines_over_one_unet_keep_their_own_options(base, assert_close):
    expected = draw(base, num_inference_steps=STEPS)
    both = over(base, guidance_interval=(0.2, 0.8), deep_cache_interval=2)
    first = draw(both, num_inference_steps=STEPS)
    assert (first - expected).abs().max() > 1e-2
    assert torch.equal(draw(base, num_inference_steps=STEPS), expected)
    base._plan_key = None  # planned anew, as after a move: the other one keeps its hooks
    assert torch.equal(draw(base, num_inference_steps=STEPS), expected)
    assert torch.equal(draw(both, num_inference_steps=STEPS), first)


def test_threads_do_not_see_each_others_steps(base):
    both = over(base, guidance_interval=(0.2, 0.8), deep_cache_interval=2)
    calls = [{"seed": seed, "num_inference_steps": 4 + seed} for seed in range(4)]
    expected = [draw(both, **call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda call: draw(both, **call), calls))
    for image, wanted in zip(images, expected, strict=True):
        assert torch.equal(image, wanted)


# Guidance interval


def guided_from_to(start: float, end: float):
    """A callback for stock: guidance 5 in the interval; outside of it 1, at which the formula is the identity."""

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = scale_at(step + 1)
        return tensors

    def scale_at(step: int) -> float:
        # Not 1.0 itself, at which stock would no longer double the batch in the middle of a call.
        return 5.0 if start <= step / STEPS < end else 1.0 + 1e-9

    return {"guidance_scale": scale_at(0), "callback_on_step_end": callback, "num_inference_steps": STEPS}


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("images", [1, 2])
def test_interval_equals_stock_with_the_guidance_formula_switched_off(stock, base, assert_close, interval, images):
    expected = draw(stock, num_images_per_prompt=images, **guided_from_to(*interval))
    pipe = over(base, guidance_interval=interval)
    run = {"num_images_per_prompt": images, "guidance_scale": 5.0, "num_inference_steps": STEPS}
    result = []
    sizes = batches_of(pipe.unet.conv_in, lambda: result.append(draw(pipe, **run)))
    assert_close(result[0], expected)
    inside = [interval[0] <= step / STEPS < interval[1] for step in range(STEPS)]
    assert sizes == [2 * images if guided else images for guided in inside]


def test_interval_keeps_keys_and_values_of_both_shapes(base):
    pipe = over(base, guidance_interval=(0.25, 0.75))
    layer = pipe.unet.context_cache.layers[0].to_k
    assert batches_of(layer, lambda: draw(pipe, num_inference_steps=STEPS)) == [1, 2]


def test_interval_without_guidance_changes_nothing(base):
    expected = draw(base, guidance_scale=1.0)
    assert torch.equal(draw(over(base, guidance_interval=(0.3, 0.6)), guidance_scale=1.0), expected)


# An interval that no step of a call falls into: the call must equal one without guidance.
NEVER = {"guidance_interval": (0.99, 1.0)}


def test_interval_halves_controlnets_too(assert_close):
    call = {"image": [picture(3), picture(4)], "guidance_scale": 5.0}
    expected = draw(with_controlnets(Family(), count=2), **{**call, "guidance_scale": 1.0})
    pipe = with_controlnets(Family(lossy(**NEVER)), count=2)
    result = []
    for net in pipe.controlnet.nets:
        assert batches_of(net.conv_in, lambda: result.append(draw(pipe, **call))) == [1, 1, 1]
        assert_close(result[-1], expected)


def test_interval_in_guess_mode(assert_close):
    call = {"image": picture(3), "guess_mode": True}
    expected = draw(with_controlnets(Family()), guidance_scale=1.0, **call)
    assert_close(draw(with_controlnets(Family(lossy(**NEVER))), guidance_scale=5.0, **call), expected)


def test_interval_with_an_ip_adapter(assert_close):
    stock, fast = load_stock(), load_fast(lossy(**NEVER))
    load_ip_adapter(stock)
    load_ip_adapter(fast)
    conditional = [image_embeds()[0][1:]]
    expected = draw(stock, guidance_scale=1.0, ip_adapter_image_embeds=conditional)
    assert_close(draw(fast, guidance_scale=5.0, ip_adapter_image_embeds=image_embeds()), expected)


def test_interval_in_inpainting(assert_close):
    call = {"image": picture(), "mask_image": mask(), "height": 64, "width": 64, "num_inference_steps": 4}
    expected = draw_from(Family().load(StableDiffusionXLInpaintPipeline), guidance_scale=1.0, **call)
    fast = Family(lossy(**NEVER)).load(StableDiffusionXLInpaintPipeline)
    assert_close(draw_from(fast, guidance_scale=5.0, **call), expected)


def test_interval_counts_steps_not_evaluations(base):
    # Heun evaluates the UNet twice a step, but for the last.
    pipe = over(base, guidance_interval=(0.5, 1.0))
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert batches_of(pipe.unet.conv_in, lambda: draw(pipe, num_inference_steps=4)) == [1] * 4 + [2] * 3


def test_warmup_runs_both_shapes(base):
    pipe = over(base, guidance_interval=(0.8, 1.0))
    sizes = batches_of(pipe.unet.conv_in, lambda: pipe.warmup(sizes=[(64, 64)]))
    assert set(sizes) == {1, 2}


# Deep-feature reuse


@pytest.mark.parametrize("interval", [2, 3, 20])
def test_inner_blocks_run_in_every_nth_step(base, interval):
    pipe = over(base, deep_cache_interval=interval)
    blocks = [*pipe.unet.down_blocks[1:], pipe.unet.mid_block, *pipe.unet.up_blocks[:-1]]
    outer = [pipe.unet.down_blocks[0], pipe.unet.up_blocks[-1]]
    for model, runs in [*((b, math.ceil(STEPS / interval)) for b in blocks), *((b, STEPS) for b in outer)]:
        inner = model.resnets[0].conv1
        assert len(batches_of(inner, lambda: draw(pipe, num_inference_steps=STEPS))) == runs


@torch.no_grad()
def shallow_by_hand(unet, deep: torch.Tensor, sample, timestep, context, added) -> torch.Tensor:
    """What a step between is, from stock blocks: the outermost level alone around the kept features."""
    emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
    emb = emb + unet.get_aug_embed(emb, context, added)
    hidden = unet.conv_in(sample)
    _, skips = unet.down_blocks[0](hidden_states=hidden, temb=emb)
    last = unet.up_blocks[-1]
    skips = (hidden, *skips)[: len(last.resnets)]
    hidden = last(hidden_states=deep, temb=emb, res_hidden_states_tuple=skips)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def test_a_step_between_is_the_outer_level_around_kept_features(stock, base, assert_close):
    seen, deep = [], []
    unet = base.unet
    handles = [
        unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True),
        unet.register_forward_hook(lambda _, args, output: seen.append(output[0].clone())),
    ]
    pipe = over(base, deep_cache_interval=2)
    draw(pipe, num_inference_steps=2)
    for handle in handles:
        handle.remove()
    (args, kwargs), _, (later, later_kwargs), predicted = seen
    handle = stock.unet.up_blocks[-2].register_forward_hook(lambda _, args, output: deep.append(output))
    with torch.no_grad():
        stock.unet(*args, kwargs["encoder_hidden_states"], added_cond_kwargs=kwargs["added_cond_kwargs"])
    handle.remove()
    context, added = later_kwargs["encoder_hidden_states"], later_kwargs["added_cond_kwargs"]
    assert_close(predicted, shallow_by_hand(stock.unet, deep[0], *later, context, added))


def test_features_are_not_reused_across_a_change_of_batch(base):
    pipe = over(base, guidance_interval=(0.5, 1.0), deep_cache_interval=3)
    inner = pipe.unet.mid_block.resnets[0].conv1
    # Steps 0 and 3 of the unguided half; afresh at step 4, where the batch doubles; then step 7.
    assert batches_of(inner, lambda: draw(pipe, num_inference_steps=STEPS)) == [1, 1, 2, 2]


def test_deep_cache_with_controlnet_sizes_and_freeu():
    pipe = with_controlnets(Family(lossy(deep_cache_interval=2)))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    for size in ((64, 64), (72, 104)):
        latents = draw(pipe, image=picture(3, 64), height=size[0], width=size[1], num_inference_steps=4)
        assert torch.isfinite(latents).all()


def test_a_direct_call_of_the_unet_is_exact(base):
    over(base, guidance_interval=(0.5, 1.0), deep_cache_interval=2).explain()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 77, 192)
    added = {"text_embeds": torch.randn(2, 128), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        first, second = (base.unet(*inputs, added_cond_kwargs=added)[0] for _ in range(2))
    assert torch.equal(first, second) and first.shape[0] == 2


def test_lossy_options_do_not_recompile_after_warmup():
    pipe = load_fast(lossy(guidance_interval=(0.5, 1.0), deep_cache_interval=2, compile="regional"))
    pipe.warmup(sizes=[(64, 64)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.isfinite(draw(pipe, num_inference_steps=STEPS)).all()
