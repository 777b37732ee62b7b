"""Packed weights: stock's results, stock's state dict, and plain again for whoever asks for a weight."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from support.embedded import draw, load_fast, load_stock
from support.loras import UNET_TARGETS, write_lora

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.ladder import weight_bytes
from fastdiff.models.memory_format import ChannelsLastTransformer2DModel
from fastdiff.weights import PackedConv2d, PackedGate, PackedLinear, choose_packing, count_packed, packed

PACKED = FastConfig.preset("exact", pack_weights=True, tuning="off")


def load_packed() -> FastStableDiffusionXLPipeline:
    pipe = load_fast(PACKED)
    assert step(pipe).applied
    return pipe


def step(pipe):
    return next(step for step in pipe.plan if step.name == "pack_weights")


def packed_layers(pipe, kind) -> list:
    return [module for module in pipe.unet.modules() if type(module) is kind]


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"height": 72, "width": 104}, {"prompt": ["a", "b"]}])
def test_equals_stock(stock, assert_close, call):
    pipe = load_packed()
    for kind in (PackedLinear, PackedConv2d, PackedGate):
        assert packed_layers(pipe, kind)
    before = count_packed(pipe.unet)
    assert_close(draw(pipe, **call), draw(stock, **call))
    assert count_packed(pipe.unet) == before, "a call asked for a weight"


def test_bfloat16_is_as_near_to_float32_as_stock(stock):
    reference = draw(stock)
    errors = []
    for pipe in (load_stock().to(torch.bfloat16), load_packed().to(torch.bfloat16)):
        errors.append(((draw(pipe).float() - reference).norm() / reference.norm()).item())
    assert step(pipe).applied == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert errors[1] < 1.25 * errors[0] < 0.1


def test_takes_the_place_of_the_plain_weights(stock):
    pipe = load_packed()
    assert weight_bytes(pipe) == weight_bytes(stock)
    assert not any("weight" in layer._parameters for layer in packed_layers(pipe, PackedLinear))


def test_state_dict_is_stocks(stock, tmp_path, assert_close):
    pipe = load_packed()
    ours, theirs = pipe.unet.state_dict(), stock.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert count_packed(pipe.unet), "saving ended packing"
    pipe.unet.save_pretrained(tmp_path)
    again = type(stock.unet).from_pretrained(tmp_path)
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())


def test_loads_other_weights(assert_close):
    pipe, other = load_packed(), load_stock()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(1 + 0.05 * torch.rand(()))
    before = draw(pipe)
    pipe.unet.load_state_dict(other.unet.state_dict())
    assert_close(draw(pipe), draw(other))
    assert count_packed(pipe.unet), "the plan packs again"
    assert (draw(pipe) - before).abs().max() > 1e-3


def test_an_edited_weight_counts(assert_close):
    pipe, other = load_packed(), load_stock()
    before, packed = draw(pipe), count_packed(pipe.unet)
    with torch.no_grad():
        for unet in (pipe.unet, other.unet):
            unet.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj.weight.mul_(1.5)
            unet.mid_block.resnets[0].conv1.weight.data *= 1.5
    # The convolution of the embedded model is too narrow to be packed.
    assert count_packed(pipe.unet) == packed - 1
    expected = draw(other)
    assert_close(draw(pipe), expected)
    assert (before - expected).abs().max() > 1e-3
    assert count_packed(pipe.unet) == packed, "the plan packs again"


def test_a_replaced_weight_counts(assert_close):
    pipe, other = load_packed(), load_stock()
    draw(pipe)
    for unet in (pipe.unet, other.unet):
        layer = unet.mid_block.attentions[0].proj_in
        layer.weight = torch.nn.Parameter(2 * layer.weight.detach(), requires_grad=False)
    assert_close(draw(pipe), draw(other))


def test_loras(tmp_path, assert_close):
    file = write_lora(load_stock(), tmp_path, seed=3)
    assert UNET_TARGETS
    pipe, other = load_packed(), load_stock()
    plain = draw(pipe)
    packed = count_packed(pipe.unet)
    for change in (
        lambda p: p.load_lora_weights(file, adapter_name="one"),
        lambda p: p.set_adapters(["one"], [0.4]),
        lambda p: p.fuse_lora(adapter_names=["one"]),
        lambda p: p.unfuse_lora(),
        lambda p: p.unload_lora_weights(),
    ):
        for each in (pipe, other):
            change(each)
        assert_close(draw(pipe), draw(other))
        assert count_packed(pipe.unet) > packed // 2
    assert_close(draw(pipe), plain)
    assert count_packed(pipe.unet) == packed


def test_gradients(stock):
    unet = load_packed().unet
    sample = torch.randn(1, 4, 8, 8, requires_grad=True)
    added = {"text_embeds": torch.zeros(1, stock.text_encoder_2.config.projection_dim), "time_ids": torch.zeros(1, 6)}
    context = torch.randn(1, 77, stock.unet.config.cross_attention_dim)
    results = []
    for model in (unet, stock.unet):
        (output,) = model(sample, 10, context, added_cond_kwargs=added, return_dict=False)
        results.append(torch.autograd.grad(output.square().sum(), sample)[0])
    assert torch.allclose(*results, rtol=1e-3, atol=1e-3 * results[1].abs().max().item())


def test_autocast(stock):
    pipe, pictures = load_packed(), []
    for each in (pipe, load_stock()):
        with torch.autocast("cpu", torch.bfloat16):
            pictures.append(draw(each))
    assert (pictures[0] - pictures[1]).norm() / pictures[1].norm() < 0.05


def test_casting_and_copying(assert_close):
    pipe = load_packed()
    expected, packed = draw(pipe), count_packed(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    pipe.to(torch.float64)
    assert not count_packed(pipe.unet)
    assert "oneDNN packs" in step(pipe).reason
    pipe.to(torch.float32)
    assert_close(draw(pipe), expected)
    assert count_packed(pipe.unet) == packed == count_packed(twin)
    pipe.unet = twin
    assert_close(draw(pipe), expected)


def test_a_hook_on_the_gate_is_called():
    pipe = load_packed()
    gate = next(module for module in pipe.unet.modules() if isinstance(module, GEGLU)).proj
    seen = []
    handle = gate.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    draw(pipe, num_inference_steps=1)
    handle.remove()
    assert seen == [gate.out_features]


def test_another_pipeline_may_want_it_off(stock, assert_close):
    pipe = load_packed()
    off = FastStableDiffusionXLPipeline.from_pipe(pipe, fast=FastConfig.preset("exact", pack_weights=False))
    assert not step(off).applied and not count_packed(pipe.unet)
    assert_close(draw(pipe), draw(stock))
    assert count_packed(pipe.unet), "its own plan packs again"


def test_small_and_shared_models_are_left_plain():
    assert "too small" in step(load_fast("exact")).reason
    stock = load_stock()
    large = FastStableDiffusionXLPipeline.from_pipe(stock, fast="exact").unet
    large.register_parameter("ballast", torch.nn.Parameter(torch.empty(100_000_000, dtype=torch.int8), False))

    def choose(**changes):
        device = torch.device(changes.pop("device", "cpu"))
        is_shared = large.shares_weights_with() is not None
        return choose_packing("auto", large, device, **{"is_compiled": False, "is_shared": is_shared, **changes})

    assert not choose().enabled and "share the weights" in choose().reason
    del stock
    assert choose().enabled
    assert not choose(is_compiled=True).enabled
    assert "cuda" in choose(device="cuda").reason


@torch.no_grad()
def test_a_convolution_is_packed_for_the_pictures_that_it_meets(monkeypatch, assert_close):
    """On AVX2 oneDNN wants other layouts for other sizes, and over the wrong one takes many times as long."""
    layer = torch.nn.Conv2d(64, 96, 3, padding=1).to(memory_format=torch.channels_last)
    small, large = (torch.randn(1, 64, side, side).to(memory_format=torch.channels_last) for side in (4, 32))
    expected = [layer(small), layer(large)]
    plain = layer.weight.detach().clone()
    wanted, asked = packed._wanted_layout, []

    def layout(weight, dtype, geometry, shape):
        asked.append(shape)
        return wanted(weight, dtype, geometry, shape)

    monkeypatch.setattr(packed, "_wanted_layout", layout)
    PackedConv2d.make(layer)
    for _ in range(2):
        for x, result in zip((small, large), expected, strict=True):
            assert_close(layer(x), result)
            best = wanted(plain.shape, plain.dtype, packed._geometry(layer), x.shape)
            assert packed._layout(layer.packed_weight) == best
    # What no processor asks for: it is packed again when the size changes, not in each call.
    monkeypatch.setattr(packed, "_wanted_layout", lambda weight, dtype, geometry, shape: bytes(shape[2:]))
    monkeypatch.setattr(packed, "_layout", lambda weight: b"")
    layer.fitting.clear()
    held = []
    for x in (small, small, large, large):
        assert_close(layer(x), expected[x is large])
        held.append(layer.packed_weight)
    assert held[0] is held[1] is not held[2] is held[3]
    assert set(asked) == {small.shape, large.shape}
    assert torch.equal(layer.weight, plain)
    # Packed anew, it is so for the size that it met last, at once.
    pack, packed_for = packed._pack, []
    monkeypatch.setattr(packed, "_pack", lambda *given: packed_for.append(given[2]) or pack(*given))
    PackedConv2d.make(layer)
    assert packed_for == [large.shape]
    assert_close(layer(large), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_left_plain_on_processors_for_which_onednn_has_none(dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    unet = load_fast("exact").unet.to(dtype)
    choice = choose_packing(True, unet, torch.device("cpu"), is_compiled=False, is_shared=False)
    assert choice.enabled == (dtype == torch.float32)
    assert choice.enabled or "packs no bfloat16 on this processor" in choice.reason


def test_what_from_pretrained_loads_is_shared_with_nobody():
    assert load_fast("exact").unet.shares_weights_with() is None


def test_transformers_stay_in_channels_last():
    pipe = load_packed()
    transformer = next(m for m in pipe.unet.modules() if isinstance(m, ChannelsLastTransformer2DModel))
    formats = []
    transformer.register_forward_hook(lambda module, args, output: formats.append(output[0]))
    draw(pipe, num_inference_steps=1)
    assert formats[0].is_contiguous(memory_format=torch.channels_last) and not formats[0].is_contiguous()


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_wrong_value(wrong):
    with pytest.raises(ValueError, match="pack_weights"):
        FastConfig(pack_weights=wrong)
