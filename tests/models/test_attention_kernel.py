"""Our attention on CPUs against PyTorch's, and where it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from support.attention import SIZES, check_rows_are_apart, check_what_is_left_to_pytorch, distance, hide, qkv
from support.embedded import draw
from support.loras import write_lora

import fastdiff
from fastdiff import FastConfig, FastStableDiffusionXLPipeline, attention_choice
from fastdiff.models.attention_kernel import attend, load_attention

pytestmark = pytest.mark.skipif(load_attention() is None, reason="needs a C++ compiler and AVX512-BF16")


@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_as_exact_as_pytorchs(size, factor):
    query, key, value = qkv(*SIZES[size])
    query, value = query * factor, value * factor
    keys = key.shape[2]
    added = torch.randn(1, 1, 1, keys, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mask in (None, added, *([hide(keys, 3)] if keys > 3 else [])):
        wide = None if mask is None else mask.float()
        expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=wide)
        result = attend(query, key, value, mask)
        theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert result.shape == expected.shape and result.transpose(1, 2).is_contiguous()
        assert distance(result, expected) <= 1.2 * distance(theirs, expected) + 1e-3


def test_what_is_not_finite_stays_in_its_row():
    check_rows_are_apart(attend)
    query, key, value = qkv(1, 2, 30, 64)
    value[0, 0, 3, 5] = torch.inf
    assert not attend(query, key, value, None)[0, 0, :, 5].isfinite().any()


def test_what_it_does_not_take_is_left_to_pytorch():
    check_what_is_left_to_pytorch(attend)
    assert attend(*qkv(1, 2, 30, 64, channels=32), None) is None


@pytest.fixture
def checkpoint(tmp_path):
    """Heads of 64 channels as SDXL has them, in bfloat16."""
    config = UNet2DConditionModel.load_config(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet")
    changes = {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
    }
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**config, **changes})
    stock = fastdiff.FastStableDiffusionXLPipeline.from_pretrained(
        fastdiff.EMBEDDED_CHECKPOINT, unet=unet, fast="off", dtype=torch.bfloat16
    )
    stock.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(checkpoint, dtype=torch.bfloat16, **fields) -> FastStableDiffusionXLPipeline:
    config = FastConfig.preset("exact", **fields)
    pipe = FastStableDiffusionXLPipeline.from_pretrained(checkpoint, fast=config, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def any_size(monkeypatch, tmp_path):
    """Tune small models too, in a file of its own."""
    monkeypatch.setattr(attention_choice, "MIN_PARAMETERS", 0)
    return str(tmp_path / "tuning.json")


def step_of(pipe):
    return next(step for step in pipe.plan if step.name == "attention")


@pytest.fixture
def wins(monkeypatch):
    """Whatever was measured, our kernel is taken where it is right: here layers are tiny, and the machine is busy."""
    by_measurement = attention_choice.choose

    def choose(outcomes, allowed):
        return allowed[0] if outcomes[allowed[0]].refused is None else by_measurement(outcomes, allowed)

    monkeypatch.setattr(attention_choice, "choose", choose)


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def counted(*tensors):
        seen.append(tensors[0].shape)
        return attend(*tensors)

    monkeypatch.setattr(attention_choice, "attend", counted)
    return seen


def test_every_layer_takes_it_where_it_wins_and_one_field_switches_it_off(checkpoint, any_size, wins, calls, tmp_path):
    pipe, without = load(checkpoint, tuning=any_size), load(checkpoint, tuning=any_size, attention="pytorch")
    exact = load(checkpoint, torch.float32)
    theirs = draw(without).float()
    assert not calls and "switched off by FastConfig.attention" in step_of(without).reason
    assert pipe.plan, "measures"
    calls.clear()
    result = draw(pipe).float()
    layers = sum(name.endswith(("attn1", "attn2")) for name, _ in pipe.unet.named_modules())
    assert len(calls) == 3 * layers
    step = step_of(pipe)
    assert step.applied and step.lossless and "measured here" in step.reason, step.reason
    assert "self and cross-attention" in step.reason
    # Rounding alone: as near to float32 as PyTorch's in bfloat16.
    expected = draw(exact)
    assert distance(result, expected) < 1.3 * distance(theirs, expected) < 0.1
    file = write_lora(load(checkpoint, attention="pytorch"), tmp_path, seed=1)
    for each in (pipe, without, exact):
        each.load_lora_weights(file)
    calls.clear()
    result, theirs, expected = draw(pipe).float(), draw(without).float(), draw(exact)
    assert distance(result, expected) < 1.3 * distance(theirs, expected) < 0.1 and len(calls) == 3 * layers


def test_a_copy_and_a_second_size_take_it_too(checkpoint, any_size, wins, calls):
    pipe = load(checkpoint, tuning=any_size)
    draw(pipe, num_inference_steps=1)
    calls.clear()
    twin = copy.deepcopy(pipe.unet)
    pipe.unet = twin
    draw(pipe, num_inference_steps=1, height=96)
    assert calls


@pytest.mark.parametrize(
    "broken, why",
    [
        (lambda q, k, v, m: attend(q, k, v, None) if m is None else attend(q, k, v, None) * 1.1, "wrong by"),
        (lambda q, k, v, m: 1 / 0, "ZeroDivisionError"),
        (lambda q, k, v, m: None, "Error"),
    ],
    ids=["wrong", "raises", "takes nothing"],
)
def test_a_kernel_that_is_wrong_is_never_taken(checkpoint, any_size, wins, monkeypatch, broken, why):
    monkeypatch.setattr(attention_choice, "attend", broken)
    pipe = load(checkpoint, tuning=any_size)
    draw(pipe, num_inference_steps=1)
    step = step_of(pipe)
    # The first is right for self-attention, which has no mask.
    assert "cross" not in (step.reason if step.applied else ""), step.reason
    assert why == "wrong by" or (not step.applied and why in step.reason), step.reason


def test_a_small_model_is_left_to_pytorch(checkpoint):
    pipe = load(checkpoint)
    draw(pipe, num_inference_steps=1)
    assert not step_of(pipe).applied and "small" in step_of(pipe).reason


def test_compiled_code_has_pytorchs(checkpoint, any_size, wins, calls, fresh_compiler):
    pipe, expected = load(checkpoint, tuning=any_size), draw(load(checkpoint, attention="pytorch")).float()
    draw(pipe)
    pipe.unet.compile(backend="eager", fullgraph=True)
    calls.clear()
    assert distance(draw(pipe).float(), expected) < 0.1 and not calls
