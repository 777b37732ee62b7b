"""Fused projections hold the weights once, and a fused model still saves and loads stock checkpoints."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from legs import LEG, draw, storage_bytes

STOCK = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}


@pytest.fixture(scope="module")
def pipe():
    pipe = LEG.pipeline()
    draw(pipe)
    return pipe


@pytest.fixture(params=STOCK)
def model(pipe, request):
    model = getattr(pipe, request.param)
    fuse(model)
    unfuse(model)
    yield model
    if is_fused(model):
        unfuse(model)


def is_fused(model) -> bool:
    return any(name.endswith(("to_qkv", "to_kv")) for name, _ in model.named_modules())


def fuse(model):
    model.fuse_qkv_projections()
    assert is_fused(model)


def unfuse(model):
    model.unfuse_qkv_projections()
    assert not is_fused(model)


def test_fusing_needs_no_memory(model):
    size, count = storage_bytes(model), sum(p.numel() for p in model.parameters())
    fuse(model)
    assert (storage_bytes(model), sum(p.numel() for p in model.parameters())) == (size, count)
    unfuse(model)
    assert storage_bytes(model) == size


def test_output_is_the_same(model, pipe):
    expected = draw(pipe, output_type="pt")
    fuse(model)
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected, rtol=0, atol=1e-4)


def test_checkpoints_are_stock_in_both_directions(model, pipe, tmp_path):
    original = {key: value.clone() for key, value in model.state_dict().items()}
    changed = {key: value + 1 for key, value in original.items()}
    fuse(model)
    assert model.state_dict().keys() == original.keys()
    model.load_state_dict(changed)
    model.save_pretrained(tmp_path)
    stock_class = STOCK["unet" if model is pipe.unet else "vae"]
    loaded, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, changed[key]) for key, value in loaded.state_dict().items())
    model.load_state_dict(original)
    unfuse(model)
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


def test_a_plain_processor_gets_its_layers_back(pipe):
    expected = draw(pipe)
    fuse(pipe.unet)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert not is_fused(pipe.unet)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
