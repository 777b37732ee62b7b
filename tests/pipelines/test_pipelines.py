"""FastStableDiffusionXLPipeline against the stock class: images, checkpoints, memory, bad input."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from support.embedded import draw, load_fast, load_stock, storage_bytes

import fastdiff
from fastdiff import FastConfig, FastStableDiffusionXLPipeline, FastUNet2DConditionModel
from fastdiff.pipelines.checkpoints import loading_dtype

SIZES = [(64, 64), (64, 96), (128, 72)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("images", [1, 2])
def test_exact_equals_stock_and_off_is_bit_identical(stock, exact, off, assert_close, size, guidance, images):
    for seed in range(3):
        call = {
            "seed": seed, "num_inference_steps": 5, "width": size[0], "height": size[1],
            "guidance_scale": guidance, "num_images_per_prompt": images,
        }
        expected = draw(stock, **call)
        assert_close(draw(exact, **call), expected)
        assert torch.equal(draw(off, **call), expected)


@pytest.fixture(scope="module")
def off() -> FastStableDiffusionXLPipeline:
    return load_fast("off")


def test_decoded_images_equal_stock(stock, exact, assert_close):
    for output_type in ("pt", "np"):
        fast, expected = (torch.as_tensor(draw(p, output_type=output_type)) for p in (exact, stock))
        assert_close(fast, expected)
    assert draw(exact, output_type="pil")[0].size == (64, 64)


def test_round_trip_through_stock_without_fastdiff(stock, exact, tmp_path, assert_close):
    exact.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    script = (
        "import sys, torch; sys.modules['fastdiff'] = None\n"  # importing fastdiff would now fail
        "from diffusers import StableDiffusionXLPipeline as P\n"
        "from safetensors.torch import save_file\n"
        f"p = P.from_pretrained({str(tmp_path / 'saved')!r}, dtype=torch.float32)\n"
        "image = p('a red circle on a blue background', num_inference_steps=3, height=64, width=64,"
        " output_type='pt', generator=torch.Generator().manual_seed(0)).images\n"
        f"save_file({{'image': image}}, {str(tmp_path / 'image.safetensors')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    image = load_file(tmp_path / "image.safetensors")["image"]
    assert_close(draw(exact, output_type="pt"), image)
    assert_close(draw(stock, output_type="pt"), image)


def test_loads_what_stock_saves(stock, tmp_path, assert_close):
    stock.save_pretrained(tmp_path)
    fast = FastStableDiffusionXLPipeline.from_pretrained(tmp_path, fast="exact")
    assert isinstance(fast.unet, FastUNet2DConditionModel)
    assert_close(draw(fast), draw(stock))


def test_from_pipe_shares_every_storage():
    source = load_stock()
    before = {name: p.data_ptr() for name, p in source.unet.named_parameters()}
    fast = FastStableDiffusionXLPipeline.from_pipe(source, fast="exact")
    assert {name: p.data_ptr() for name, p in fast.unet.named_parameters()} == before
    assert fast.text_encoder is source.text_encoder
    total = sum(storage_bytes(source.components[name]) for name in ("unet", "vae"))
    draw(fast)
    assert fast.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.is_fused
    assert storage_bytes(fast.unet) + storage_bytes(fast.vae) <= total


def test_from_pipe_keeps_dtype_scheduler_and_source(stock, assert_close):
    source = load_stock()
    fast = FastStableDiffusionXLPipeline.from_pipe(source, fast="balanced")
    assert fast.unet.dtype == torch.float32
    draw(fast)
    assert_close(draw(source), draw(stock))
    half = FastStableDiffusionXLPipeline.from_pipe(load_stock(), torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16


def test_explicit_dtype_wins_over_the_preset():
    fast = FastStableDiffusionXLPipeline.from_pretrained(
        fastdiff.EMBEDDED_CHECKPOINT, fast="balanced", torch_dtype=torch.float32
    )
    assert fast.unet.dtype == torch.float32
    config = FastConfig.preset("exact", dtype=torch.bfloat16)
    fast = FastStableDiffusionXLPipeline.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, fast=config)
    assert fast.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"avx512_f", "avx512_bw", "avx512_vnni"}, torch.float32),  # Ice Lake: oneDNN imitates bfloat16
        ({"avx512_f", "avx512_bw", "avx512_vnni", "avx512_bf16"}, torch.bfloat16),  # Zen 4
        ({"avx_vnni", "avx_ne_convert"}, torch.bfloat16),  # Sierra Forest
    ],
)
def test_weights_are_bfloat16_where_the_processor_multiplies_it(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **dict.fromkeys(units, True)})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert loading_dtype(FastConfig.preset("balanced")) == expected


def test_each_switch_can_be_turned_off(stock, assert_close):
    expected = draw(stock)
    for field in ("fuse_qkv", "context_cache", "channels_last", "host_schedule"):
        fast = load_fast(FastConfig.preset("exact", **{field: False}))
        assert_close(draw(fast), expected)
        step = next(s for s in fast.plan if s.name.replace(" ", "_") == field)
        assert not step.applied and f"FastConfig.{field}" in step.reason


def test_plan_and_explain_agree(exact):
    text = exact.explain()
    assert [step.name for step in exact.plan][:3] == ["convert", "host schedule", "channels_last"]
    for step in exact.plan:
        assert step.reason in text


def test_overlapping_calls_do_not_mix(exact):
    seeds = range(8)
    expected = [draw(exact, seed=s, guidance_scale=1.0 + s, num_inference_steps=2 + s % 3) for s in seeds]
    images: dict[int, torch.Tensor] = {}

    def work(s: int) -> None:
        images[s] = draw(exact, seed=s, guidance_scale=1.0 + s, num_inference_steps=2 + s % 3)

    threads = [threading.Thread(target=work, args=(s,)) for s in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(images[s], expected[s]) for s in seeds)


def test_interrupt_reaches_an_overlapping_call(exact):
    steps: list[int] = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        exact._interrupt = True
        return tensors

    exact._calls.running.acquire()
    try:
        draw(exact, num_inference_steps=5, callback_on_step_end=stop)
    finally:
        exact._calls.running.release()
        exact._interrupt = False
    assert steps == [0]


def test_a_notebook_shows_the_plan_as_a_table(exact):
    table = exact.plan._repr_html_()
    assert table.count("<tr>") == len(exact.plan) + 1
    assert ">fuse_qkv<" in table and ">lossless<" in table and ">off<" in table


def test_deepcopy_and_warmup(assert_close):
    fast = load_fast("exact")
    twin = copy.deepcopy(fast)
    assert_close(draw(twin), draw(fast))
    fast.warmup(sizes=[(64, 64)], batch_sizes=[1, 2])
    assert fast.unet.context_cache.nbytes > 0
    fast.free_caches()
    assert fast.unet.context_cache.nbytes == 0


def test_unknown_preset_is_refused_before_loading(tmp_path):
    with pytest.raises(ValueError, match="Unknown preset 'fastest'"):
        FastStableDiffusionXLPipeline.from_pretrained(tmp_path / "nothing", fast="fastest")


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="without model_index.json"):
        FastStableDiffusionXLPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be found"):
        FastStableDiffusionXLPipeline.from_pretrained(tmp_path / "missing", local_files_only=True)


def test_a_stable_diffusion_1_checkpoint(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline checkpoint"):
        FastStableDiffusionXLPipeline.from_pretrained(tmp_path)


def test_a_stable_diffusion_1_unet(stock):
    from diffusers import UNet2DConditionModel

    small = UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32)
    components = {**stock.components, "unet": small}
    with pytest.raises(ValueError, match="needs an SDXL UNet"):
        FastStableDiffusionXLPipeline(**components)


def test_pickles_are_refused_unless_allowed(stock, tmp_path):
    stock.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="holds no safetensors"):
        FastStableDiffusionXLPipeline.from_pretrained(tmp_path)


def test_size_not_divisible_by_8(exact):
    with pytest.raises(ValueError, match="divisible by 8"):
        draw(exact, height=100)


def test_from_pipe_and_from_stock_take_the_right_things(stock):
    with pytest.raises(TypeError, match="diffusers pipeline"):
        FastStableDiffusionXLPipeline.from_pipe(stock.unet)
    with pytest.raises(TypeError, match="UNet2DConditionModel, not a AutoencoderKL"):
        FastUNet2DConditionModel.from_stock(stock.vae)


def test_a_compiled_fast_unet_stays_what_it_is(stock, assert_close):
    pipe = load_fast("exact")
    compiled = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    pipe.unet = compiled
    assert pipe.unet is compiled
    assert_close(draw(pipe), draw(stock))
