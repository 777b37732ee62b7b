"""Fused projections: one storage, stock keys, and every way in which diffusers touches attention layers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from support.embedded import draw, load_fast, load_stock, storage_bytes
from support.loras import write_lora

from fastdiff import FastAutoencoderKL, FastUNet2DConditionModel, FusedQKVAttnProcessor
from fastdiff.models.controlnet import FastControlNetModel


@pytest.fixture
def unet(stock) -> FastUNet2DConditionModel:
    return FastUNet2DConditionModel.from_stock(copy.deepcopy(stock.unet))


def self_attentions(model: torch.nn.Module) -> list[Attention]:
    return [m for m in model.modules() if isinstance(m, Attention) and not m.is_cross_attention]


def test_fusing_holds_one_copy_and_unfusing_restores(stock, unet):
    before = storage_bytes(unet)
    unet.fuse_qkv_projections()
    assert all(a.is_fused and "to_q" not in a._modules for a in self_attentions(unet))
    assert storage_bytes(unet) == before == storage_bytes(stock.unet)
    fused = [a.to_qkv.weight.data_ptr() for a in self_attentions(unet)]
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert not any(a.is_fused for a in self_attentions(unet))
    assert storage_bytes(unet) == before
    assert [name for name, _ in sorted(unet.named_parameters())] == sorted(dict(stock.unet.named_parameters()))
    unet.fuse_qkv_projections()
    assert [a.to_qkv.weight.data_ptr() for a in self_attentions(unet)] == fused


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_state_dict_is_stock_in_both_directions(stock, name):
    source = getattr(stock, name)
    kind = FastUNet2DConditionModel if name == "unet" else FastAutoencoderKL
    model = kind.from_stock(copy.deepcopy(source))
    expected = source.state_dict()
    for step in (model.fuse_qkv_projections, model.unfuse_qkv_projections):
        step()
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        changed = {key: value + 1 for key, value in expected.items()}
        model.load_state_dict(changed)
        assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())
        twin = copy.deepcopy(source)
        twin.load_state_dict(model.state_dict())
        assert all(torch.equal(value, changed[key]) for key, value in twin.state_dict().items())
        model.load_state_dict(expected)


@pytest.mark.parametrize("name", ["unet", "vae", "controlnet"])
def test_what_is_wanted_outlives_another_processor(stock, name):
    if name == "controlnet":
        model = FastControlNetModel.from_stock(ControlNetModel.from_unet(stock.unet))
    else:
        kind = FastUNet2DConditionModel if name == "unet" else FastAutoencoderKL
        model = kind.from_stock(copy.deepcopy(getattr(stock, name)))
    layers, ours = self_attentions(model), FusedQKVAttnProcessor()
    model.set_attn_processor(ours)
    assert not any(a.is_fused for a in layers), "nobody asked for it yet"
    model.fuse_qkv_projections()
    assert layers and all(a.is_fused for a in layers)
    model.set_attn_processor(AttnProcessor2_0())
    assert not any(a.is_fused for a in layers)
    model.set_attn_processor(ours)
    assert all(a.is_fused for a in layers)
    model.unfuse_qkv_projections()
    model.set_attn_processor(ours)
    assert not any(a.is_fused for a in layers)


@pytest.mark.parametrize("kind", [FastUNet2DConditionModel, FastControlNetModel])
def test_another_processor_gets_no_keys_of_the_former(stock, kind):
    is_unet = kind is FastUNet2DConditionModel
    model = kind.from_stock(copy.deepcopy(stock.unet) if is_unet else ControlNetModel.from_unet(stock.unet))
    with torch.no_grad():
        model.context_cache.project(torch.randn(1, 77, stock.unet.config.cross_attention_dim))
    held = model.context_cache.nbytes
    model.set_attn_processor(AttnProcessor2_0())
    assert held > model.context_cache.nbytes == 0


def test_a_missing_part_is_reported_as_missing(stock, unet):
    unet.fuse_qkv_projections()
    state = stock.unet.state_dict()
    key = next(k for k in state if k.endswith("attn1.to_k.weight"))
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        unet.load_state_dict(state)


def test_moving_and_casting_keep_one_copy(unet):
    unet.fuse_qkv_projections()
    half = storage_bytes(unet) // 2
    assert storage_bytes(unet.to(torch.bfloat16)) == half


def test_vae_equals_stock_fused_and_not(stock, assert_close):
    vae = FastAutoencoderKL.from_stock(copy.deepcopy(stock.vae))
    latents, image = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = stock.vae.decode(latents).sample
        moments = stock.vae.encode(image).latent_dist.parameters
        for step in (vae.fuse_qkv_projections, vae.unfuse_qkv_projections):
            step()
            assert_close(vae.decode(latents)[0], expected)
            assert_close(vae.encode(image)[0].parameters, moments)
            assert_close(vae.decode(latents, return_dict=True).sample, expected)
        assert isinstance(vae.decode(latents), tuple) and isinstance(vae.encode(image), tuple)
        assert_close(vae(image).sample, stock.vae(image).sample)


def test_encoder_attention_mask(stock, unet, assert_close):
    unet.fuse_qkv_projections()
    mask = torch.ones(2, 77)
    mask[:, 40:] = 0
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 77, stock.unet.config.cross_attention_dim),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, stock.text_encoder_2.config.projection_dim),
            "time_ids": torch.zeros(2, 6),
        },
    }
    with torch.no_grad():
        expected = stock.unet(**inputs).sample
        assert_close(unet(**inputs)[0], expected)
        unmasked = unet(**{**inputs, "encoder_attention_mask": None}).sample
        assert (unmasked - expected).abs().max() > 1e-3
        assert_close(unet(**inputs, return_dict=True).sample, expected)


def test_processors_of_the_user_get_separate_projections(stock, assert_close):
    fast = load_fast()
    expected = draw(stock)
    ours = fast.unet.attn_processors
    fast.unet.set_attn_processor(AttnProcessor2_0())
    assert_close(draw(fast), expected)
    assert not any(a.is_fused for a in self_attentions(fast.unet))
    fast.unet.set_attn_processor(ours)
    assert_close(draw(fast), expected)
    assert all(a.is_fused for a in self_attentions(fast.unet))
    fast.unet.set_default_attn_processor()
    assert all(type(p) is AttnProcessor for p in fast.unet.attn_processors.values())
    assert_close(draw(fast), expected)


def test_attention_slicing(stock, assert_close):
    fast = load_fast()
    draw(fast)
    fast.enable_attention_slicing(1)
    assert_close(draw(fast), draw(stock))
    fast.disable_attention_slicing()
    assert_close(draw(fast), draw(stock))


def test_processor_without_arguments_like_upstreams():
    assert isinstance(FusedQKVAttnProcessor(), AttnProcessor2_0)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return write_lora(load_stock(), tmp_path_factory.mktemp("lora"), seed=1)


def test_fused_lora_is_written_into_the_shared_storage(lora, assert_close):
    fast, reference = load_fast(), load_stock()
    draw(fast)
    plain = draw(reference)
    for pipe in (fast, reference):
        pipe.load_lora_weights(lora)
    assert all(a.is_fused for a in self_attentions(fast.unet)), "an adapter runs beside the fused product"
    adapted = draw(reference)
    assert (adapted - plain).abs().max() > 1e-2
    assert_close(draw(fast), adapted)
    for pipe in (fast, reference):
        pipe.fuse_lora()
    assert all(a.is_fused for a in self_attentions(fast.unet))
    assert storage_bytes(fast.unet) == storage_bytes(reference.unet)
    assert_close(draw(fast), draw(reference))
    fast.unet.to(torch.float64).to(torch.float32)
    assert storage_bytes(fast.unet) == storage_bytes(reference.unet)

    for pipe in (fast, reference):
        pipe.unfuse_lora()
    assert_close(draw(fast), adapted)
    for pipe in (fast, reference):
        pipe.unload_lora_weights()
    assert all(a.is_fused for a in self_attentions(fast.unet))
    assert_close(draw(fast), plain)
    assert fast.unet.state_dict().keys() == reference.unet.state_dict().keys()
