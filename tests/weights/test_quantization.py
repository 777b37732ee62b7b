"""Which scheme on which device, which layers, how far results move, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.embedded import draw, load_fast, load_stock

from fastdiff import FastConfig, FastStableDiffusionXLPipeline, FastUNet2DConditionModel
from fastdiff.weights import apply_quantization, choose_quantization, count_packed, plain_layers
from fastdiff.weights.activations import quantize, quantize_padded
from fastdiff.weights.geglu import GatedGEGLU
from fastdiff.weights.int8 import Int8Conv2d, Int8Gate, Int8Linear, RowsFeedForward, convert_feed_forward
from fastdiff.weights.int8_units import int8_units, sums_in_16_bits
from fastdiff.weights.saved import FILE
from fastdiff.weights.sources import Kept

CPU = torch.device("cpu")
UNITS = int8_units()
needs_int8 = pytest.mark.skipif(UNITS is None, reason="needs AVX2, VNNI or AMX")
needs_default = pytest.mark.skipif(
    UNITS is None or torch.cuda.is_available(), reason="the default on CPUs with int8 units, without a GPU"
)
SCHEMES = [pytest.param("int8-dynamic", marks=needs_int8), "int8-weight-only"]


def choose(requested: str = "auto", device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16, **changes):
    """The choice for a full-size model."""
    return choose_quantization(requested, device, dtype, **{"parameters": 2_600_000_000, **changes})


def test_a_large_model_is_quantized_by_default_where_the_cpu_has_int8_units():
    choice = choose()
    if UNITS is not None and not torch.cuda.is_available():
        assert choice.scheme == "int8-dynamic" and UNITS in choice.reason
        assert choose(dtype=torch.float32).scheme == "int8-dynamic"
    else:
        assert choice.scheme is None


@needs_default
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"parameters": 99_000_000}, "99 M parameters"),
        ({"is_compiled": True}, "compiled"),
        ({"is_shared": True}, "held twice"),
        ({"device": torch.device("mps")}, "faster than bfloat16 on mps"),
    ],
)
def test_what_it_does_not_go_with_leaves_it_off_and_says_why(changes, reason):
    choice = choose(**changes)
    assert choice.scheme is None and reason in choice.reason


def test_cpus_without_int8_units_and_machines_with_a_gpu_are_left_alone(monkeypatch):
    """No CPU lacks what it has: here, and only here, the probes are told what to answer."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose().scheme == "int8-dynamic" and "VNNI" in choose().reason
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose().scheme == "int8-dynamic" and "AVX2" in choose().reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose().scheme is None and "GPU" in choose().reason
    assert choose("int8-dynamic").scheme == "int8-dynamic", "asked for"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose().scheme is None and "no units" in choose().reason
    with pytest.raises(ValueError, match="AVX2, VNNI or AMX"):
        choose("int8-dynamic")


def quantize_step(pipe):
    return next(step for step in pipe.plan if step.name == "quantize")


def test_small_models_are_left_alone_and_the_plan_says_why():
    default = quantize_step(load_fast("balanced").to(torch.bfloat16))
    assert not default.applied and not default.lossless
    assert "too small to gain" in default.reason or UNITS is None or torch.cuda.is_available()
    asked = quantize_step(load_fast(FastConfig.preset("balanced", quantization="int8-weight-only")))
    assert not asked.applied and "0 layers" in asked.reason and "too small to gain" in asked.reason


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-weight-only"])
def test_a_scheme_that_the_device_cannot_run_is_refused_before_the_loop(scheme):
    fast = load_fast(FastConfig.preset("balanced", quantization=scheme, tuning="off"))
    with pytest.raises(ValueError, match=rf"{scheme}.*8\.9"):
        draw(fast)


def test_what_a_scheme_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        choose("int8-weight-only", dtype=torch.float16)
    if UNITS is not None:
        with pytest.raises(ValueError, match="compile='auto' or 'off'"):
            choose("int8-dynamic", is_compiled=True)


def make_wide_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """SDXL's structure for the embedded checkpoint, wide enough that its layers are worth quantizing."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 512), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=(1, 8),
        **{key: EMBEDDED_CONFIG[key] for key in (
            "cross_attention_dim", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        )},
    )
    return unet.to(dtype).eval().requires_grad_(False)


EMBEDDED_CONFIG = json.loads(
    (Path(sys.modules["fastdiff"].EMBEDDED_CHECKPOINT) / "unet" / "config.json").read_text(encoding="utf-8")
)


def make_fast_unet(dtype: torch.dtype = torch.float32) -> FastUNet2DConditionModel:
    unet = FastUNet2DConditionModel.from_stock(make_wide_unet(dtype))
    unet.fuse_qkv_projections()
    return unet


def make_pipe(scheme: str = "none", dtype: torch.dtype = torch.bfloat16, **fields) -> FastStableDiffusionXLPipeline:
    # Whatever is left plain is packed, as it is where no stock pipeline over it is alive.
    fast = FastConfig.preset("balanced", quantization=scheme, **{"pack_weights": True, "tuning": "off", **fields})
    pipe = load_stock().to(dtype)
    pipe = FastStableDiffusionXLPipeline.from_pipe(pipe, unet=make_wide_unet(dtype), fast=fast)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_inputs(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    pooled = EMBEDDED_CONFIG["projection_class_embeddings_input_dim"] - 6 * EMBEDDED_CONFIG["addition_time_embed_dim"]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "sample": noise(2, 4, 16, 16),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": noise(2, 77, EMBEDDED_CONFIG["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": noise(2, pooled), "time_ids": torch.zeros(2, 6, dtype=dtype)},
    }


@torch.no_grad()
def relative_error(unet, reference: torch.Tensor) -> float:
    out = unet(**unet_inputs(unet.dtype)).sample.float()
    return ((out - reference).norm() / reference.norm()).item()


ROLES = {"attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight-only"])
def test_layers_are_chosen_by_role(scheme):
    layers, left = plain_layers(make_fast_unet().to(memory_format=torch.channels_last), scheme)
    linears = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    inside = {name for name in linears if ".transformer_blocks." in name}
    assert {name.split(".transformer_blocks.")[1].partition(".")[2] for name in inside} == ROLES
    assert left["once a prompt"] == 8
    outside, convolutions = linears - inside, layers.keys() - linears
    if scheme == "int8-weight-only":
        assert not outside and not convolutions and left["outside of transformer blocks"] > 6
        return
    assert {name.rsplit(".", 1)[-1] for name in outside} == {"proj_in", "proj_out"}
    assert {name.rsplit(".", 1)[-1] for name in convolutions} == {"conv1", "conv2", "conv"}
    assert all(layers[name].kernel_size == (3, 3) for name in convolutions) and left["for precision"] > 2


def count_kind(unet, kind) -> int:
    return sum(isinstance(module, kind) for module in unet.modules())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_shrink_by_half_and_the_result_moves_little(scheme):
    unet = make_fast_unet(torch.bfloat16)
    with torch.no_grad():
        reference = unet(**unet_inputs(torch.bfloat16)).sample.float()
    done = apply_quantization(unet, scheme, "asked")
    assert done.taken == (32 if scheme == "int8-dynamic" else 24)
    assert 0.49 < done.bytes_after / done.bytes_before <= 0.52
    assert done.model_before - done.model_after == done.bytes_before - done.bytes_after
    assert 0 < relative_error(unet, reference) < (0.04 if scheme == "int8-dynamic" else 0.02)
    assert count_kind(unet, RowsFeedForward) == (4 if scheme == "int8-dynamic" else 0)
    assert plain_layers(unet, scheme)[0] == {}, "nothing is quantized twice"


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight as int8 has it: one scale an output feature, no sum of two neighbours' larger than what fits."""
    plain = weight.float()
    largest = plain.abs().flatten(1).amax(1)
    if sums_in_16_bits():
        largest = torch.maximum(largest, (plain[:, 0::2] + plain[:, 1::2]).abs().flatten(1).amax(1))
    row = largest.view(-1, *[1] * (weight.ndim - 1)) / 127
    return (plain / row).round() * row


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_sum_is_cut_off_whatever_the_weights_and_the_inputs_are(dtype):
    """As far as sums go: all weights and all inputs are the largest, and of one sign."""
    picture = torch.full((1, 64, 8, 8), 3.0, dtype=dtype).to(memory_format=torch.channels_last)
    inputs = {Int8Linear: picture.flatten(2).mT, Int8Conv2d: picture}
    for (form, x), sign in itertools.product(inputs.items(), (1, -1)):
        layer = torch.nn.Linear(64, 32) if form is Int8Linear else torch.nn.Conv2d(64, 32, 3)
        layer = layer.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        layer.weight.fill_(sign / 7)
        expected = layer(x)
        form.make(layer)
        assert (layer(x) - expected).norm() / expected.norm() < 0.02


@needs_int8
def test_weights_that_were_quantized_elsewhere_are_fitted_to_what_this_processor_sums():
    weight = torch.randint(-127, 128, (32, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight[:3], scale = 127, torch.rand(32, generator=torch.Generator().manual_seed(1)) / 100
    layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    x = torch.full((8, 64), 0.5)
    expected = torch.nn.functional.linear(x, weight * scale[:, None])
    Int8Linear.restore(layer, weight, scale)
    assert (layer(x) - expected).norm() / expected.norm() < 0.02


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_int8_layers_equal_their_own_definition(dtype):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 64).to(dtype), torch.randn(2, 7, 96).to(dtype)
    values, scale, zero_point = quantize(x)
    rounded_x = (values.float() - zero_point) * scale
    expected = torch.nn.functional.linear(rounded_x, rounded(layer.weight), layer.bias.float())
    Int8Linear.make(layer)
    got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
    ],
)
@torch.no_grad()
def test_int8_convolutions_equal_their_own_definition(dtype, options):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(32, 48, **options).to(dtype)
    x = (torch.randn(2, 32, 10, 12) + 0.5).to(dtype)
    values, scale, zero_point = quantize_padded(x, (0, 0))
    rounded_x = (values.float() - zero_point) * scale
    bias = None if layer.bias is None else layer.bias.float()
    expected = torch.nn.functional.conv2d(
        rounded_x, rounded(layer.weight), bias, layer.stride, layer.padding, layer.dilation
    )
    Int8Conv2d.make(layer)
    got = layer(x)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-5)
    assert torch.equal(copy.deepcopy(layer)(x), got) and torch.equal(pickle.loads(pickle.dumps(layer))(x), got)


@needs_int8
@torch.no_grad()
def test_an_int8_geglu_equals_the_stock_one_over_the_same_layer():
    torch.manual_seed(0)
    stock, x = GEGLU(96, 64), torch.randn(2, 7, 96)
    Int8Gate.make(stock.proj)
    expected = stock(x)
    stock.__class__ = GatedGEGLU
    torch.testing.assert_close(stock(x), expected, rtol=1e-5, atol=1e-6)


@needs_int8
@torch.no_grad()
def test_a_feed_forward_layer_takes_many_rows_in_parts():
    torch.manual_seed(0)
    feed = FeedForward(64, activation_fn="geglu").bfloat16()
    Int8Gate.make(feed.net[0].proj)
    feed.net[0].__class__ = GatedGEGLU
    Int8Linear.make(feed.net[2])
    convert_feed_forward(feed)
    assert type(feed) is RowsFeedForward
    x, widths = torch.randn(3, 700, 64).bfloat16(), []
    x[2] *= 5
    feed.net[0].register_forward_hook(lambda module, args, output: widths.append(len(args[0])))
    got = feed(x)
    assert widths == [700, 700, 700], "parts of equal size, none above the limit"
    assert torch.equal(got, torch.stack([FeedForward.forward(feed, rows) for rows in x]))
    assert torch.equal(feed(x[:, :20]), FeedForward.forward(feed, x[:, :20])), "few rows: one scale"


@needs_int8
@torch.no_grad()
def test_an_int8_layer_without_plain_weights_is_copied_pickled_and_cast_and_says_what_it_lacks():
    torch.manual_seed(0)
    layer, x = GEGLU(96, 64), torch.randn(3, 96)
    Int8Gate.make(layer.proj)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    for wants_plain in (lambda: layer.proj.weight, layer.state_dict):
        with pytest.raises(ValueError, match="was saved quantized"):
            wants_plain()
    assert torch.equal(layer.to(torch.bfloat16).float()(x).sign(), expected.sign())
    plain = GEGLU(96, 64)
    layer.load_state_dict(plain.state_dict())
    assert type(layer.proj) is torch.nn.Linear and torch.equal(layer(x), plain(x))


@needs_int8
@torch.no_grad()
def test_an_int8_layer_gives_its_plain_weight_back():
    torch.manual_seed(0)
    plain, x = GEGLU(96, 64), torch.randn(3, 96)
    layer = copy.deepcopy(plain)
    Int8Gate.make(layer.proj, Kept(layer.proj.weight.detach()))
    quantized = layer(x)
    assert not torch.equal(quantized, plain(x)) and torch.allclose(quantized, plain(x), atol=0.05)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in layer.state_dict().items())
    assert type(layer.proj) is Int8Gate, "saving leaves it quantized"
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), plain(x))
    assert torch.equal(copy.deepcopy(layer).double()(x.double()), plain.double()(x.double()))
    layer.proj.weight.mul_(2)
    assert type(layer.proj) is torch.nn.Linear


@needs_int8
@torch.no_grad()
def test_zeros_and_values_that_are_not_finite_are_not_hidden():
    layer = torch.nn.Linear(96, 64)
    Int8Linear.make(layer)
    assert torch.equal(layer(torch.zeros(2, 96)), layer.bias.expand(2, -1))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 96)
        x[0, 3] = bad
        assert not layer(x).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_explain_tells_layers_bytes_and_reason(scheme):
    pipe = make_pipe(scheme)
    lines = [line for line in pipe.explain().splitlines() if " quantize " in line]
    assert len(lines) == 1 and lines[0].strip().startswith("on") and "lossy" in lines[0]
    for expected in (scheme, "layers", "MiB", "left: ", "8 once a prompt", "asked for"):
        assert expected in lines[0]


LOAD = """
import sys, torch
from fastdiff import FastConfig, FastStableDiffusionXLPipeline
sys.path[:0] = ["tests", "tests/weights"]
from support.embedded import draw
fast = FastConfig(tuning="off")
pipe = FastStableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16, fast=fast)
pipe.set_progress_bar_config(disable=True)
assert pipe.unet.quantized.scheme == sys.argv[3], pipe.unet.quantized
torch.save(draw(pipe), sys.argv[2])
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_pipeline_draws_the_same_picture_in_a_new_process(scheme, tmp_path):
    pipe = make_pipe(scheme)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe", quantized=True)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "pipe", tmp_path / "latents.pt", scheme], check=True, cwd=root
    )
    assert torch.equal(torch.load(tmp_path / "latents.pt"), expected)
    # What was loaded can be saved again, and says what it is.
    again = FastStableDiffusionXLPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16)
    assert again.unet.quantized == pipe.unet.quantized and scheme in again.explain()
    assert count_kind(again.unet, RowsFeedForward) == count_kind(pipe.unet, RowsFeedForward)
    again.save_pretrained(tmp_path / "again", quantized=True)
    first, second = (load_file(tmp_path / name / "unet" / FILE) for name in ("pipe", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipe")


def test_a_file_that_is_damaged_or_of_another_scheme_is_refused(tmp_path):
    pipe = make_pipe("int8-weight-only")
    pipe.save_pretrained(tmp_path, quantized=True)
    load = FastStableDiffusionXLPipeline.from_pretrained
    for fast in ("exact", FastConfig(quantization="int8-dynamic")):
        with pytest.raises(ValueError, match="is quantized with 'int8-weight-only'"):
            load(tmp_path, fast=fast)

    path = tmp_path / "unet" / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load(tmp_path)
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    lacking = {key: value for key, value in tensors.items() if "ff.net.2._weight_scale" not in key}
    save_file(lacking, path, metadata)
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load(tmp_path)
    save_file(tensors, path, {**metadata, "version": "99"})
    with pytest.raises(ValueError, match="format 'fastdiff-quantized' '99'"):
        load(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_pipeline_over_one_unet_gets_the_form_that_it_asks_for(scheme):
    pipe = make_pipe(scheme)
    plain = {name: value.clone() for name, value in make_wide_unet(torch.bfloat16).state_dict().items()}
    before = draw(pipe)
    exact = FastStableDiffusionXLPipeline.from_pipe(pipe, fast=FastConfig.preset("exact", tuning="off"))
    exact.set_progress_bar_config(disable=True)
    reference = draw(make_pipe("none", pack_weights=False))
    assert torch.equal(draw(exact), reference) and exact.unet.quantized is None
    assert torch.equal(draw(pipe), before) and pipe.unet.quantized.scheme == scheme
    assert all(torch.equal(value, plain[name]) for name, value in pipe.unet.state_dict().items())
    pipe.unet = make_wide_unet(torch.bfloat16)
    assert getattr(pipe.unet, "quantized", None) is None
    assert torch.equal(draw(pipe), before) and pipe.unet.quantized.scheme == scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stock_pipeline_over_the_same_weights_is_not_quantized(scheme):
    stock = load_stock().to(torch.bfloat16)
    stock.unet = make_wide_unet(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in stock.unet.named_parameters()}
    fast = FastStableDiffusionXLPipeline.from_pipe(stock, fast=FastConfig(quantization=scheme, tuning="off"))
    assert fast.plan and fast.unet.quantized
    after = dict(stock.unet.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def stock_of_full_size() -> StableDiffusionXLPipeline:
    """A stock pipeline whose UNet has as many parameters as the default asks for; most of them do nothing."""
    stock = load_stock().to(torch.bfloat16)
    stock.unet = make_wide_unet(torch.bfloat16)
    ballast = torch.empty(100_000_000, dtype=torch.bfloat16)
    stock.unet.mid_block.register_parameter("ballast", torch.nn.Parameter(ballast, requires_grad=False))
    return stock


@needs_default
def test_by_default_layers_are_quantized_once_no_stock_pipeline_shares_them(tmp_path):
    stock = stock_of_full_size()
    reference = draw(stock).float()
    pipe = FastStableDiffusionXLPipeline.from_pipe(stock)
    exact = FastStableDiffusionXLPipeline.from_pipe(pipe, fast="exact")
    for each in (pipe, exact):
        each.set_progress_bar_config(disable=True)
    near = draw(pipe).float()
    assert not quantize_step(pipe).applied and "held twice" in quantize_step(pipe).reason
    del stock
    assert "FastConfig.quantization" in quantize_step(exact).reason
    # By the other pipeline's plan, where oneDNN packs bfloat16.
    assert bool(count_packed(pipe.unet)) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    moved = draw(pipe).float()
    steps = {step.name: step for step in pipe.plan}
    assert steps["quantize"].applied and UNITS in steps["quantize"].reason
    assert "measured here" in steps["quantize"].reason and count_kind(pipe.unet, Int8Linear) > 0
    assert 0.02 < (moved - near).norm() / reference.norm() < 0.15
    assert torch.equal(draw(pipe).float(), moved), "the plan is applied once"
    again = draw(exact).float()
    assert count_kind(pipe.unet, Int8Linear) == 0, "the plan of the other pipeline gets plain weights back"
    assert (again - near).norm() / reference.norm() < 0.05


@needs_default
def test_by_default_a_compiler_keeps_the_layers_plain():
    pipe = FastStableDiffusionXLPipeline.from_pipe(stock_of_full_size())
    pipe.unet.compile()
    assert "compiled" in quantize_step(pipe).reason
    assert count_kind(pipe.unet, Int8Linear) == 0


PEAK = """
import sys, torch
from pathlib import Path
sys.path[:0] = ["tests", "tests/weights"]
from test_quantization import apply_quantization, UNet2DConditionModel, EMBEDDED_CONFIG
from fastdiff import FastUNet2DConditionModel

def held(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

with torch.device("meta"):
    unet = UNet2DConditionModel(
        block_out_channels=(64, 640, 640), layers_per_block=1, attention_head_dim=(1, 10, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
        transformer_layers_per_block=(1, 2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )
unet = unet.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
for parameter in unet.parameters():
    parameter.fill_(0.01)
unet = FastUNet2DConditionModel.from_stock(unet)
unet.fuse_qkv_projections()
unet.save_pretrained(sys.argv[2])
unet.register_to_config(_name_or_path=sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
weights, before = sum(p.nbytes for p in unet.parameters()), held("VmRSS")
done = apply_quantization(unet, sys.argv[1])
print(weights, held("VmHWM") - before, held("VmRSS") - before, done.bytes_before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_second_copy_of_the_model_is_held_while_quantizing(scheme, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, scheme, tmp_path],
        check=True,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        # What is freed goes back to the system at once, so that resident memory is what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    weights, peak, after, taken = map(int, ran.stdout.split())
    assert taken > 0.4 * weights and peak < 0.1 * weights
    assert after < -0.4 * taken, "the plain weights are let go"
