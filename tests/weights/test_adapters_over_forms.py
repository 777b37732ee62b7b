"""LoRA and whatever else asks for plain weights, at any time, over every form that a quantized pipeline has."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoKrConfig
from support.embedded import draw, load_stock
from support.loras import UNET_TARGETS, write_lora
from test_quantization import SCHEMES as INT8_SCHEMES
from test_quantization import UNITS, make_wide_unet, needs_int8

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.models.form import count_forms
from fastdiff.weights import int8
from fastdiff.weights.int8 import Int8
from fastdiff.weights.torchao_form import TorchaoLinear

SCHEMES = [*INT8_SCHEMES, "fp8-dynamic"]
# Of a processor without units for int8 products, the one that there is.
INT8 = "int8-dynamic" if UNITS else "int8-weight-only"
# Beyond what quantization costs without an adapter; its rounding differs with every change of a weight.
FACTOR, SLACK = 3.0, 0.01
SEQUENCES = int(os.environ.get("FASTDIFF_FORM_SEQUENCES", "6"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose UNet is wide enough to be quantized, two LoRAs beside it."""
    root = tmp_path_factory.mktemp("wide")
    pipe = load_stock()
    pipe.unet = make_wide_unet()
    pipe.save_pretrained(root / "checkpoint")
    for name, seed in (("one", 3), ("two", 4)):
        (root / name).mkdir()
        write_lora(pipe, root / name, seed=seed, targets=(*UNET_TARGETS, "ff.net.0.proj", "ff.net.2"))
    return root


@pytest.fixture
def float8_anywhere(monkeypatch):
    """torchao computes float8 on CPUs too, but for its check; and the gate asks for the capability of a GPU."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("fastdiff.weights.schemes._capability", lambda device: (9, 0))


def load(
    folder: Path, scheme: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[StableDiffusionXLPipeline, FastStableDiffusionXLPipeline]:
    stock = StableDiffusionXLPipeline.from_pretrained(folder / "checkpoint", torch_dtype=dtype)
    config = FastConfig.preset("exact", quantization=scheme, pack_weights=True, tuning="off")
    fast = FastStableDiffusionXLPipeline.from_pretrained(folder / "checkpoint", torch_dtype=dtype, fast=config)
    for pipe in (stock, fast):
        pipe.set_progress_bar_config(disable=True)
    return stock, fast


def distance(fast, stock, **call) -> float:
    """Relative distance of one step's latents."""
    ours, theirs = (draw(pipe, num_inference_steps=1, **call).float() for pipe in (fast, stock))
    return ((ours - theirs).norm() / theirs.norm()).item()


def count_quantized(unet) -> int:
    return sum(isinstance(module, Int8 | TorchaoLinear) for module in unet.modules())


def _file(folder: Path, name: str) -> Path:
    return next((folder / name).glob("*.safetensors"))


def _edit(pipe) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight.mul_(1.25)


def _reload(pipe) -> None:
    pipe.unet.load_state_dict({name: value.clone() for name, value in pipe.unet.state_dict().items()})


def _loaded(pipe) -> list[str]:
    return list(getattr(pipe.unet, "peft_config", {}))


# Each takes a pipeline and the folder, and does nothing where stock would raise for want of an adapter.
OPERATIONS = {
    "load": lambda p, f: "one" in _loaded(p) or p.load_lora_weights(_file(f, "one"), adapter_name="one"),
    "load another": lambda p, f: "two" in _loaded(p) or p.load_lora_weights(_file(f, "two"), adapter_name="two"),
    "weigh": lambda p, f: _loaded(p) and p.set_adapters(_loaded(p), [0.5] * len(_loaded(p))),
    "disable": lambda p, f: _loaded(p) and p.disable_lora(),
    "enable": lambda p, f: _loaded(p) and p.enable_lora(),
    "delete": lambda p, f: len(_loaded(p)) > 1 and p.delete_adapters(_loaded(p)[0]),
    "unload": lambda p, f: p.unload_lora_weights(),
    "processor": lambda p, f: p.unet.set_attn_processor(AttnProcessor2_0()),
    "default processor": lambda p, f: p.unet.set_default_attn_processor(),
    "edit": lambda p, f: _edit(p),
    "load_state_dict": lambda p, f: _loaded(p) or _reload(p),
    "freeu": lambda p, f: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "slicing": lambda p, f: p.enable_attention_slicing(1),
    "dtype and back": lambda p, f: p.to(torch.float32).to(torch.bfloat16),
    "deepcopy": lambda p, f: setattr(p, "unet", copy.deepcopy(p.unet)),
    "picture": lambda p, f: draw(p, num_inference_steps=1),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_lora_comes_and_goes_after_the_first_picture(scheme, folder, float8_anywhere):
    stock, fast = load(folder, scheme)
    limit = FACTOR * distance(fast, stock) + SLACK
    plain, quantized, forms = draw(fast), count_quantized(fast.unet), count_forms(fast.unet)
    expected = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    assert quantized and all(attn.is_fused for attn in fast.unet._self_attentions)

    for pipe in (stock, fast):
        pipe.load_lora_weights(_file(folder, "one"), adapter_name="one")
    assert count_quantized(fast.unet) == quantized, "an adapter takes no form away"
    assert distance(fast, stock) < limit
    assert all(attn.is_fused for attn in fast.unet._self_attentions), "nor a fused projection"
    assert distance(fast, stock, cross_attention_kwargs={"scale": 0.3}) < limit
    for pipe in (stock, fast):
        pipe.load_lora_weights(_file(folder, "two"), adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.7, -0.4])
    assert distance(fast, stock) < limit and count_quantized(fast.unet) == quantized
    for pipe in (stock, fast):
        pipe.delete_adapters("two")
        pipe.fuse_lora(adapter_names=["one"])
    assert distance(fast, stock) < limit and count_quantized(fast.unet) == quantized, "made again over merged weights"
    for pipe in (stock, fast):
        pipe.unfuse_lora()
    assert distance(fast, stock) < limit
    for pipe in (stock, fast):
        pipe.unload_lora_weights()
    found = fast.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items()), "the very bits"
    assert torch.equal(draw(fast), plain) and count_forms(fast.unet) == forms


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_counts(scheme, folder, float8_anywhere):
    _, fast = load(folder, scheme)
    before = draw(fast)
    fast.load_lora_weights(_file(folder, "one"), adapter_name="one")
    with_it = draw(fast)
    assert (with_it - before).float().norm() / before.float().norm() > 0.05
    fast.disable_lora()
    assert torch.equal(draw(fast), before)


def test_hotswap_touches_no_form(folder):
    stock, fast = load(folder, INT8)
    draw(fast)
    for pipe in (stock, fast):
        pipe.load_lora_weights(_file(folder, "one"), adapter_name="one")
    limit = FACTOR * distance(fast, stock) + SLACK
    held = [module.held() for module in fast.unet.modules() if isinstance(module, Int8)]
    for _ in range(2):
        for name in ("two", "one"):
            for pipe in (stock, fast):
                pipe.load_lora_weights(_file(folder, name), adapter_name="one", hotswap=True)
            assert distance(fast, stock) < limit
    after = [module.held() for module in fast.unet.modules() if isinstance(module, Int8)]
    assert all(a is b for x, y in zip(held, after, strict=True) for a, b in zip(x, y, strict=True))


def test_lokr_beside_fused_packed_projections(folder):
    stock, fast = load(folder, "none", torch.float32)
    assert distance(fast, stock) < 1e-4
    for pipe in (stock, fast):
        torch.manual_seed(0)
        targets = ["to_q", "to_v", "to_out.0", "ff.net.2"]
        pipe.unet.add_adapter(LoKrConfig(r=4, target_modules=targets, init_weights=False))
    assert distance(fast, stock) < 1e-4
    assert all(attn.is_fused for attn in fast.unet._self_attentions)


def test_gradients_are_stocks(folder):
    stock, fast = load(folder, INT8)
    draw(fast)
    found = {}
    for pipe in (stock, fast):
        pipe.unet.requires_grad_(True)
        pooled = torch.ones(1, pipe.text_encoder_2.config.projection_dim)
        added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
        inputs = [torch.ones(1, 4, 8, 8), torch.tensor(10), torch.ones(1, 77, pipe.unet.config.cross_attention_dim)]
        inputs = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in inputs]
        added = {name: value.to(torch.bfloat16) for name, value in added.items()}
        pipe.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0].float().square().sum().backward()
        found[pipe] = {name: p.grad for name, p in pipe.unet.named_parameters() if p.grad is not None}
    theirs, ours = found.values()
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    assert (ours[name] - theirs[name]).float().norm() < 0.1 * theirs[name].float().norm()
    assert not count_quantized(fast.unet)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_saved_is_stocks(scheme, folder, tmp_path, float8_anywhere):
    stock, fast = load(folder, scheme)
    draw(fast)
    fast.save_pretrained(tmp_path / "plain")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16)
    expected = stock.unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.unet.state_dict().items())
    assert count_quantized(fast.unet), "saving leaves the forms"
    image = StableDiffusionXLImg2ImgPipeline.from_pipe(again)
    assert image.unet is again.unet


@pytest.fixture
def quantized(monkeypatch):
    """How many weights were quantized."""
    seen, original = [], int8._quantize_rows
    monkeypatch.setattr(int8, "_quantize_rows", lambda weight: seen.append(weight.shape) or original(weight))
    return seen


def _ask(unet) -> list[torch.nn.Parameter]:
    """Ask every int8 layer for its weight."""
    return [module.weight for module in unet.modules() if isinstance(module, Int8)]


@needs_int8
def test_who_only_looks_has_nothing_quantized_anew(folder, quantized):
    _, fast = load(folder, "int8-dynamic")
    before = draw(fast)
    layers = count_quantized(fast.unet)
    assert len(quantized) >= layers > 10
    quantized.clear()
    for _ in range(2):
        _ask(fast.unet)
        assert not count_quantized(fast.unet)
        assert torch.equal(draw(fast), before) and not quantized and count_quantized(fast.unet) == layers
    weights = _ask(fast.unet)
    weights[3].data.mul_(1.5)  # leaves no trace but the numbers
    edited = draw(fast)
    assert len(quantized) == 1 and not torch.equal(edited, before)
    _ask(fast.unet)
    assert torch.equal(draw(fast), edited) and len(quantized) == 2, "what no file holds is made anew"


@needs_int8
def test_forms_are_kept_for_nobody_else(folder, quantized, monkeypatch):
    _, fast = load(folder, "int8-dynamic")
    before = draw(fast)
    layers = count_quantized(fast.unet)
    weights = _ask(fast.unet)
    assert all(weight.kept_form is not None for weight in weights)
    assert all(pickle.loads(pickle.dumps(weight)).kept_form is None for weight in weights)
    quantized.clear()
    fast.unet = copy.deepcopy(fast.unet)
    assert torch.equal(draw(fast), before) and len(quantized) == layers
    monkeypatch.setattr("fastdiff.weights.kept.free_memory", lambda: 1 << 30)
    assert all(weight.kept_form is None for weight in _ask(fast.unet)), "where memory is short"


@pytest.mark.parametrize("fault", ["deleted", "truncated", "overwritten"])
def test_a_checkpoint_that_changed_is_named_and_pictures_go_on(fault, folder, tmp_path):
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    _, fast = load(tmp_path, INT8)
    before = draw(fast)
    file = next((tmp_path / "checkpoint" / "unet").glob("*.safetensors"))
    if fault == "deleted":
        file.unlink()
    elif fault == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(bytes(reversed(file.read_bytes())))
    assert torch.equal(draw(fast), before)
    layer = next(module for module in fast.unet.modules() if isinstance(module, Int8 | TorchaoLinear))
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors.*Pictures can still be drawn"):
        _ = layer.weight
    with pytest.raises(OSError, match="put the file back"):
        fast.save_pretrained(tmp_path / "again")
    fast.load_lora_weights(_file(folder, "one"), adapter_name="one")
    assert not torch.equal(draw(fast), before), "a LoRA needs no plain weight"


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=SEQUENCES, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=6))
def test_any_order(scheme, folder, float8_anywhere, names):
    stock, fast = load(folder, scheme)
    limit = FACTOR * distance(fast, stock) + SLACK
    for name in names:
        for pipe in (stock, fast):
            OPERATIONS[name](pipe, folder)
    assert distance(fast, stock) < limit, names
