"""torchao's products on GPUs, which run on a CPU once its check of the hardware is set aside."""

from __future__ import annotations

import pytest
import torch
from support.embedded import draw, load_fast
from torchao.quantization import quantize_

from fastdiff import FastConfig
from fastdiff.models.form import count_forms
from fastdiff.weights import apply_quantization, choose_quantization, schemes
from fastdiff.weights.torchao_form import torchao_config


@pytest.fixture
def float8_anywhere(monkeypatch):
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


@pytest.fixture
def pipe(float8_anywhere, monkeypatch):
    """The plan's own: it is told that the CPU has float8 units, and takes layers as small as the embedded model's."""
    monkeypatch.setattr(schemes, "_capability", lambda device: (9, 0))
    monkeypatch.setitem(apply_quantization.__wrapped__.__kwdefaults__, "min_weights", 64 * 64)
    return load_fast(FastConfig(quantization="fp8-dynamic")).to(torch.bfloat16)


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "a green star"}], ids=["alone", "negative prompt"])
def test_picture_with_float8_layers(pipe, stock, call):
    """Without a negative prompt SDXL's context is zeros, and so are the rows that attention makes of it."""
    assert pipe.config.force_zeros_for_empty_prompt
    picture = draw(pipe, output_type="pt", **call)
    assert count_forms(pipe.unet).total() > 50 and "on   quantize" in pipe.explain()
    expected = draw(stock, output_type="pt", **call)
    plain = draw(load_fast().to(torch.bfloat16), output_type="pt", **call)
    assert torch.isfinite(picture).all()
    error, rounding = ((drawn.float() - expected).abs().mean() for drawn in (picture, plain))
    assert rounding < error < 0.02


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "int8-dynamic"])
def test_rows_of_zeros_tiny_and_large_values(float8_anywhere, scheme):
    layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    plain = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    quantize_(layer, torchao_config(scheme))
    rows = torch.randn(4, 64, dtype=torch.bfloat16) * torch.tensor([[0.0], [1e-12], [1.0], [1e4]])
    result, expected = layer(rows.bfloat16()), plain(rows.bfloat16())
    assert torch.isfinite(result).all()
    error = (result - expected).float().norm(dim=1) / expected.float().norm(dim=1)
    assert error.max() < 0.1


@pytest.mark.parametrize(("is_compiled", "scheme"), [(True, "fp8-dynamic"), (False, None)])
def test_float8_is_chosen_where_its_quantizing_is_compiled(monkeypatch, is_compiled, scheme):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kind = torch.device("cuda"), torch.bfloat16
    choice = choose_quantization("auto", *kind, parameters=2_600_000_000, is_compiled=is_compiled)
    assert choice.scheme == scheme and (scheme or "nothing is compiled" in choice.reason)
    # Whoever asks for it gets it.
    asked = choose_quantization("fp8-dynamic", *kind, parameters=2_600_000_000, is_compiled=is_compiled)
    assert asked.scheme == "fp8-dynamic"


@pytest.mark.parametrize(("cuda", "defect"), [("12.6", False), ("12.9", True), ("13.0", False), (None, False)])
def test_cuda_with_a_defect_is_named_and_gone_around(monkeypatch, float8_anywhere, cuda, defect):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kind = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "parameters": 2_600_000_000, "is_compiled": True}
    choice, asked = (choose_quantization(requested, **kind) for requested in ("auto", "fp8-dynamic"))
    assert (choice.scheme is None) == defect == ("CUDA 12.9" in choice.reason) == ("CUDA 12.9" in asked.reason)
    assert asked.scheme == "fp8-dynamic"
    layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    quantize_(layer, torchao_config("fp8-dynamic"))
    assert layer.weight.mm_config.use_fast_accum == (not defect)


def test_float16_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kind = {"device": torch.device("cuda"), "dtype": torch.float16, "parameters": 2_600_000_000, "is_compiled": True}
    choice = choose_quantization("auto", **kind)
    assert choice.scheme is None and "torch.float16; quantization needs bfloat16" in choice.reason
    with pytest.raises(ValueError, match="load with torch_dtype=torch.bfloat16"):
        choose_quantization("fp8-dynamic", **kind)
