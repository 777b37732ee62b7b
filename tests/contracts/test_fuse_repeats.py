"""Fusing and unfusing can be called in any order, any number of times."""

import pytest
from legs import LEG


@pytest.fixture(params=["unet", "vae"])
def model(request):
    return getattr(LEG.pipeline(), request.param)


def is_fused(model) -> bool:
    """Whether self-attention runs through the fused layer."""
    if LEG.patched:
        return all("Fused" in type(processor).__name__ for processor in model.attn_processors.values())
    return any(name.endswith("to_qkv") for name, _ in model.named_modules())


def test_unfuse_before_fuse_does_nothing(model):
    processors = model.attn_processors
    model.unfuse_qkv_projections()
    assert model.attn_processors == processors


@pytest.mark.parametrize("calls", ["fu", "ffu", "ffuu", "fufu", "fuufu"])
def test_the_last_call_counts(model, calls):
    processors = model.attn_processors
    for call in calls:
        model.fuse_qkv_projections() if call == "f" else model.unfuse_qkv_projections()
        assert is_fused(model) == (call == "f")
    assert model.attn_processors == processors
