"""GroupNorm with SiLU in channels_last: the operator, and its Triton kernels by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.models import group_norm
from fastdiff.models.group_norm import (
    ChannelsLastGroupNorm,
    define_operator,
    has_kernels,
    is_channels_last,
    why_no_kernels,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# Samples, channels, groups, height, width: groups of 10, 20, 4 and 7 channels, odd sizes, one pixel.
SHAPES = ((2, 320, 32, 16, 16), (1, 640, 32, 9, 7), (1, 128, 32, 40, 33), (3, 14, 2, 5, 3), (2, 64, 32, 1, 1))


def picture(samples: int, channels: int, height: int, width: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, height, width, generator=generator) * 3 + 5
    return x.to(dtype).to(memory_format=torch.channels_last)


def parameters(channels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(channels, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("silu", [False, True])
def test_operator_equals_pytorch_and_keeps_the_format(silu):
    x, (weight, bias) = picture(2, 64, 6, 5), parameters(64)
    result = define_operator()(x, 8, weight, bias, 1e-5, silu)
    expected = F.group_norm(x, 8, weight, bias, 1e-5)
    torch.testing.assert_close(result, F.silu(expected) if silu else expected)
    assert result.is_contiguous(memory_format=torch.channels_last) and is_channels_last(result)
    call = x, 8, weight, bias, 1e-5, silu
    torch.library.opcheck(define_operator(), call, test_utils=("test_schema", "test_faketensor"))


def test_tokens_are_channels_last_too():
    tokens = torch.randn(2, 30, 64)
    assert is_channels_last(tokens.transpose(1, 2)) and not is_channels_last(tokens.contiguous())
    assert not is_channels_last(picture(2, 64, 6, 5)[:, :, ::2])


def test_layer_is_an_ordinary_one_where_there_are_no_kernels():
    layer = nn.GroupNorm(8, 64)
    x = picture(2, 64, 6, 5).requires_grad_()
    expected = layer(x)
    layer.__class__ = ChannelsLastGroupNorm
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert x.grad is not None
    assert has_kernels() is (importlib.util.find_spec("triton") is not None)


def test_kernels_are_tried_before_they_are_used(monkeypatch):
    cuda, kind = torch.device("cuda"), torch.float32
    assert why_no_kernels(torch.device("cpu"), kind) == "PyTorch's, which keeps the format on cpu"
    monkeypatch.setattr(group_norm, "has_kernels", lambda: False)
    assert why_no_kernels.__wrapped__(cuda, kind) == "PyTorch's, as Triton is not installed"
    monkeypatch.setattr(group_norm, "has_kernels", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, memory_format=None: (
        x if memory_format is None else x.contiguous(memory_format=memory_format)))  # fmt: skip
    for works, answer in (
        (lambda *call: group_norm._plain(*call), None),
        (lambda *call: group_norm._plain(*call) + 1, "PyTorch's, as our kernels differ by 1"),
        (lambda *call: 1 / 0, "PyTorch's, as our kernels failed: ZeroDivisionError"),
    ):
        monkeypatch.setattr(group_norm, "_on_cuda", works)
        why = why_no_kernels.__wrapped__(cuda, kind)
        assert why == answer if answer is None else why.startswith(answer)


@needs_triton
def test_kernels_equal_pytorch():
    """In a process of its own, as the interpreter is chosen when Triton is imported."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split()[-1] == "done"


def compare() -> None:
    from fastdiff.models.group_norm_kernels import normalize

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for samples, channels, groups, height, width in SHAPES if dtype is torch.float32 else SHAPES[2:]:
            x, (weight, bias) = picture(samples, channels, height, width, dtype), parameters(channels)
            for silu, w, b in ((True, weight, bias), (False, weight, None), (False, None, None)):
                expected = F.group_norm(x.double(), groups, *(p if p is None else p.double() for p in (w, b)), 1e-5)
                expected = F.silu(expected) if silu else expected
                result = normalize(x, groups, *(p if p is None else p.to(dtype) for p in (w, b)), 1e-5, silu)
                assert result.dtype is dtype and result.stride() == x.stride()
                torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    # A variance that is small beside the mean, as of a flat picture; tokens in place of a picture.
    x = torch.randn(1, 64, 20, 20).mul_(1e-3).add_(100).to(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), 8, eps=1e-12).float()
    torch.testing.assert_close(normalize(x, 8, None, None, 1e-12, False), expected, atol=5e-2, rtol=0)
    x = torch.randn(2, 30, 64).transpose(1, 2)
    torch.testing.assert_close(normalize(x, 8, None, None, 1e-5, False), F.group_norm(x, 8), atol=1e-5, rtol=1e-5)
    print("done")


if __name__ == "__main__":
    compare()
