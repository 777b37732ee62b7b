"""Activations to uint8: the compiled pass and the one of PyTorch's operators."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.weights import activations, int8
from fastdiff.weights.activations import load_kernels, quantize, quantize_padded
from fastdiff.weights.int8 import _quantize_rows

PASSES = [
    pytest.param("compiled", marks=pytest.mark.skipif(load_kernels() is None, reason="needs a C++ compiler")),
    "eager",
]


@pytest.fixture(params=PASSES)
def each_pass(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(activations, "load_kernels", lambda: None)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1100, 2001), (2, 0)])
def test_every_number_is_within_half_a_level(each_pass, dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3).to(dtype)
    values, scale, zero_point = quantize(x)
    assert values.dtype == torch.uint8 and values.shape == x.shape
    # In bfloat16, PyTorch's operators round on the way, too.
    limit = 0.51 if each_pass == "compiled" or dtype == torch.float32 else 1.5
    off = ((values.float() - zero_point) * scale - x.float()).abs()
    assert not off.numel() or off.max() <= limit * scale


@pytest.mark.parametrize("low", [0.0, -0.17, -2.0, -100.0])
def test_the_ends_of_the_range_never_wrap_around(each_pass, low):
    for step in range(200):
        x = torch.tensor([low, 1.0 + step / 37])
        values, scale, zero_point = quantize(x)
        assert ((values.float() - zero_point) * scale - x).abs().max() <= 0.51 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding_is_zero_and_any_memory_format_will_do(each_pass, dtype):
    x = torch.randn(2, 6, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype) - 0.5
    values, scale, zero_point = quantize_padded(x, (1, 2))
    assert values.shape == (2, 6, 11, 15) and values.is_contiguous(memory_format=torch.channels_last)
    inside = (values[:, :, 1:-1, 2:-2].float() - zero_point) * scale
    assert zero_point > 0 and (inside - x.float()).abs().max() <= 1.5 * scale
    border = values.clone()
    border[:, :, 1:-1, 2:-2] = zero_point
    assert (border == zero_point).all()
    assert torch.equal(values, quantize_padded(x.to(memory_format=torch.channels_last), (1, 2)).values)


def test_zeros_have_a_scale_and_what_is_not_finite_has_none(each_pass):
    values, scale, zero_point = quantize(torch.zeros(3, 4))
    assert scale > 0 and (values == zero_point).all()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(40_000)
        x[39_999] = bad
        assert not math.isfinite(quantize(x).scale)


@pytest.mark.skipif(load_kernels() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (70, 1001), (6, 40, 3, 3), (4, 41, 1, 3), (5, 1, 3, 3)])
@pytest.mark.parametrize("in_16_bits", [False, True])
def test_compiled_code_makes_the_same_weights_as_the_operators(dtype, shape, in_16_bits, monkeypatch):
    monkeypatch.setattr(int8, "sums_in_16_bits", lambda: in_16_bits)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1] = 0
    formats = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]
    found = [_quantize_rows(weight.to(memory_format=each)) for each in formats]
    monkeypatch.setattr(activations, "load_kernels", lambda: None)
    expected, scales = _quantize_rows(weight)
    pairs = expected[:, 0 : shape[1] // 2 * 2 : 2].int() + expected[:, 1::2]
    assert 126 <= max(expected.abs().max(), pairs.abs().max() if pairs.numel() else 0)
    assert not in_16_bits or not pairs.numel() or pairs.abs().max() <= 128
    for values, each in found:
        assert torch.equal(values, expected) and torch.equal(each, scales)


def test_what_is_not_finite_in_a_weight_stays_so(each_pass):
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.ones(4, 40)
        weight[2, 7] = bad
        assert [math.isfinite(scale) for scale in _quantize_rows(weight)[1]] == [True, True, False, True]
