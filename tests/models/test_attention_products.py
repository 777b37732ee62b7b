"""Attention in two products on CPUs without a compiler: near enough, and taken where scores may be rounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.attention import SIZES, check_rows_are_apart, check_what_is_left_to_pytorch, distance, hide, qkv
from support.embedded import draw

from fastdiff import (
    EMBEDDED_CHECKPOINT,
    FastConfig,
    FastStableDiffusionXLPipeline,
    FastUNet2DConditionModel,
    attention_choice,
)
from fastdiff.models import attention_kernel
from fastdiff.models.attention_kernel import attend_in_products
from fastdiff.tuning import Outcome


# Parts of several heads, of one head, of some rows of one, and of one row.
@pytest.mark.parametrize("scores", [1 << 20, 40_000, 4_000, 1])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_right_in_whatever_parts(size, scores, monkeypatch):
    monkeypatch.setattr(attention_kernel, "_SCORES", scores)
    query, key, value = qkv(*SIZES[size])
    keys = key.shape[2]
    added = torch.randn(1, 1, 1, keys, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mask in (None, added, *([hide(keys, 3)] if keys > 3 else [])):
        wide = None if mask is None else mask.float()
        expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=wide)
        result = attend_in_products(query, key, value, mask)
        assert result.shape == expected.shape and distance(result, expected) < 0.01


@pytest.mark.parametrize("factor", [1, 2, 4, 16])
def test_what_rounding_scores_costs_is_less_than_an_error_of_one_percent_in_queries_and_keys(factor):
    query, key, value = qkv(1, 4, 128, 256)
    query, key = query * factor, key * factor
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    generator = torch.Generator().manual_seed(2)

    def off(x: torch.Tensor) -> torch.Tensor:
        size = x.float().square().mean(dim=-1, keepdim=True).sqrt()
        return x.float() + 0.01 * size * torch.randn(x.shape, generator=generator)

    bound = distance(F.scaled_dot_product_attention(off(query), off(key), value.float()), expected)
    assert distance(attend_in_products(query, key, value, None), expected) < 0.6 * bound


def test_what_is_not_finite_stays_in_its_row():
    check_rows_are_apart(attend_in_products)


def test_what_it_does_not_take_is_left_to_pytorch():
    check_what_is_left_to_pytorch(attend_in_products)
    assert attend_in_products(*qkv(1, 2, 30, 64, channels=32), None) is not None


@pytest.fixture
def pipe(monkeypatch):
    """With heads of 64 channels, in bfloat16, on a CPU for which no kernel of ours can be compiled."""
    monkeypatch.setattr(attention_choice, "load_attention", lambda: None)
    monkeypatch.setattr(attention_choice, "MIN_PARAMETERS", 0)
    config = FastUNet2DConditionModel.load_config(EMBEDDED_CHECKPOINT, subfolder="unet")
    changes = {"block_out_channels": (64, 64, 128), "attention_head_dim": (1, 1, 2)}
    torch.manual_seed(0)
    unet = FastUNet2DConditionModel.from_config({**config, **changes}).to(torch.bfloat16).eval()

    def load(**fields) -> FastStableDiffusionXLPipeline:
        fast = FastConfig.preset("balanced", strict=True, **fields)
        pipe = FastStableDiffusionXLPipeline.from_pretrained(
            EMBEDDED_CHECKPOINT, unet=unet, dtype=torch.bfloat16, fast=fast
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def step_of(pipe):
    return next(step for step in pipe.plan if step.name == "attention")


@pytest.mark.parametrize(("ratio", "taken"), [(1.4, True), (1.05, False), (None, False)])
def test_taken_where_it_was_measured_to_win(pipe, monkeypatch, ratio, taken):
    refused = None if ratio else "wrong by 1"
    found = {"PyTorch": Outcome(), "two products": Outcome(1.0, (ratio or 1.0,) * 3, 0.004, refused, lossless=False)}
    monkeypatch.setattr(attention_choice, "measure_attention", lambda model, sizes, *_: dict.fromkeys(
        (size.key for size in sizes), found
    ))  # fmt: skip
    calls = []

    def counted(*tensors):
        calls.append(tensors)
        return attend_in_products(*tensors)

    monkeypatch.setattr(attention_choice, "attend_in_products", counted)
    expected = draw(pipe(attention="pytorch"), num_inference_steps=2).float()
    own = pipe()
    result, step = draw(own, num_inference_steps=2).float(), step_of(own)
    assert step.applied == taken and step.lossless != taken, step
    layers = sum(name.endswith(("attn1", "attn2")) for name, _ in own.unet.named_modules())
    assert len(calls) == (2 * layers if taken else 0)
    assert taken or ("wrong by 1" if refused else "two products is no faster") in step.reason
    # Both round in bfloat16.
    assert distance(result, expected) < 0.05


def test_never_where_nothing_lossy_was_asked_for(pipe, monkeypatch):
    monkeypatch.setattr(attention_choice, "measure_attention", lambda *_: pytest.fail("measured for nothing"))
    step = step_of(pipe(quantization="none"))
    assert not step.applied and step.lossless and "our kernel needs a C++ compiler" in step.reason


def test_measured_and_right(pipe, tmp_path):
    tuning = str(tmp_path / "tuning.json")
    own = pipe(tuning=tuning)
    assert step_of(own).reason
    sizes = attention_choice.attention_sizes(own.unet)
    answers = attention_choice.measure_attention(own.unet, sizes, tuning)
    refused = [str(found["two products"].refused) for found in answers.values()]
    # So small, and beside other tests, it may well be slow.
    assert len(refused) == len(sizes) and not [why for why in refused if why != "None" and "slow as plain" not in why]
    lines = attention_choice.attention_table([own.unet], tuning, False, None)
    assert len(lines) == len(sizes) and all(line.endswith("taken: PyTorch") for line in lines)
