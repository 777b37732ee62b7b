"""Fast models are ordinary classes: made in every way that a stock one is made, copied, pickled and subclassed."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from support.embedded import draw, load_fast, load_stock
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fastdiff
from fastdiff import FastAutoencoderKL, FastControlNetModel, FastUNet2DConditionModel

KINDS = {
    "unet": (UNet2DConditionModel, FastUNet2DConditionModel),
    "vae": (AutoencoderKL, FastAutoencoderKL),
    "controlnet": (ControlNetModel, FastControlNetModel),
}


def unet_inputs(unet, batch: int = 2, size: int = 8, tokens: int = 77, timestep=500) -> dict:
    generator = torch.Generator().manual_seed(0)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.randn(batch, tokens, unet.config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, width, generator=generator),
            "time_ids": torch.zeros(batch, 6),
        },
    }


@torch.no_grad()
def output(model) -> torch.Tensor:
    if isinstance(model, AutoencoderKL):
        return model.decode(torch.ones(1, 4, 8, 8), return_dict=False)[0]
    inputs = unet_inputs(model)
    if isinstance(model, ControlNetModel):
        return model(**inputs, controlnet_cond=torch.ones(2, 3, 64, 64), return_dict=False)[0][0]
    return model(**inputs, return_dict=False)[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pipe = load_stock()
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet)
    for block in (controlnet.controlnet_mid_block, *controlnet.controlnet_down_blocks):
        torch.nn.init.normal_(block.weight)
    return {"unet": pipe.unet, "vae": pipe.vae, "controlnet": controlnet}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", ["constructor", "from_config", "from_pretrained", "from_stock", "subclass"])
def test_made_in_every_way(name, way, models, tmp_path, assert_close):
    stock, (_, kind) = models[name], KINDS[name]
    if way == "from_pretrained":
        stock.save_pretrained(tmp_path)
        model = kind.from_pretrained(tmp_path)
    elif way == "from_stock":
        model = kind.from_stock(stock)
    else:
        if way == "subclass":

            class Mine(kind):
                def __init__(self, *args, **kwargs):
                    super().__init__(*args, **kwargs)
                    self.mine = True

                def forward(self, *args, **kwargs):
                    self.called = True
                    return super().forward(*args, **kwargs)

            kind = Mine
        options = {key: value for key, value in stock.config.items() if not key.startswith("_")}
        model = kind.from_config(stock.config) if way == "from_config" else kind(**options)
        model.eval().load_state_dict(stock.state_dict())
    assert isinstance(model, kind)
    assert_close(output(model), output(stock))
    assert way != "subclass" or name == "vae" or model.called
    model.fuse_qkv_projections()
    assert_close(output(model), output(stock))
    model.save_pretrained(tmp_path / "saved")
    assert_close(output(KINDS[name][0].from_pretrained(tmp_path / "saved")), output(stock))


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles(name, models, assert_close):
    model = KINDS[name][1].from_stock(models[name])
    model.fuse_qkv_projections()
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is KINDS[name][1] and twin.shares_weights_with() is None
        assert_close(output(twin), expected)
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert_close(output(model), expected)
    assert model.shares_weights_with() is models[name]
    assert pickle.loads(pickle.dumps(KINDS[name][1])) is KINDS[name][1]


@pytest.mark.parametrize("name", KINDS)
def test_signatures_and_outputs_are_stocks(name, models):
    stock, fast = KINDS[name]
    for method in ("__init__", "forward", "encode", "decode"):
        if hasattr(stock, method):
            expected, actual = (inspect.signature(getattr(kind, method)).parameters for kind in (stock, fast))
            assert list(actual) == list(expected)
    model = fast.from_stock(models[name])
    with torch.no_grad():
        result = model.decode(torch.ones(1, 4, 8, 8)) if name == "vae" else None
        if name == "unet":
            result = model(**unet_inputs(model))
    if result is not None:
        assert isinstance(result, tuple) and result["sample"] is result.sample is result[0] is result.to_tuple()[0]
        assert dict(result.items()).keys() == {*result.keys()} == {"sample"} and result.values() == tuple(result)


@pytest.mark.parametrize("name", KINDS)
def test_default_processors(name, models, assert_close):
    model = KINDS[name][1].from_stock(models[name])
    model.set_default_attn_processor()
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
    assert_close(output(model), output(models[name]))


def test_a_stand_in_equals_its_stock_class_alone():
    assert FastUNet2DConditionModel == UNet2DConditionModel and UNet2DConditionModel == FastUNet2DConditionModel
    assert FastUNet2DConditionModel in [UNet2DConditionModel] and {UNet2DConditionModel: 1}[FastUNet2DConditionModel]
    assert FastUNet2DConditionModel is not UNet2DConditionModel and FastUNet2DConditionModel != AutoencoderKL

    class Mine(FastUNet2DConditionModel):
        pass

    assert Mine != UNet2DConditionModel and Mine != FastUNet2DConditionModel


def test_projections_are_found_by_their_names_after_fusing(models):
    unet = FastUNet2DConditionModel.from_stock(copy.deepcopy(models["unet"]))
    unet.fuse_qkv_projections()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.is_fused
    weight = attention.to_k.weight
    assert torch.equal(weight, models["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight)
    assert not attention.is_fused


def test_hooks_on_a_projection_are_called(models):
    unet = FastUNet2DConditionModel.from_stock(copy.deepcopy(models["unet"]))
    seen = []
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: seen.append(1))
    unet.fuse_qkv_projections()
    output(unet)
    assert seen


@pytest.mark.parametrize("after", ["before the first picture", "after it"])
@pytest.mark.parametrize("over_stock_pipeline", [False, True])
def test_fusing_by_the_pipelines_method(after, over_stock_pipeline, stock, assert_close):
    fast = load_fast("exact")
    pipe = StableDiffusionXLPipeline.from_pipe(fast) if over_stock_pipeline else fast
    if after == "after it":
        draw(pipe)
    expected = draw(stock)
    processors = pipe.unet.attn_processors
    layers = pipe.unet._self_attentions
    pipe.fuse_qkv_projections()
    assert all(layer.is_fused for layer in layers)
    assert_close(draw(pipe), expected)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert not any(layer.is_fused for layer in layers)
    assert_close(draw(pipe), expected)
    assert not any(layer.is_fused for layer in layers), "the user's choice stands"
    assert pipe.unet.attn_processors == processors
    if not over_stock_pipeline:
        assert "unfuse_qkv_projections()" in pipe.explain()
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    pipe.unet.fuse_qkv_projections()
    pipe.unet.set_attn_processor(FusedAttnProcessor2_0())
    assert_close(draw(pipe), expected)
    pipe.unet.unfuse_qkv_projections()
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize("after", ["before the first picture", "after it"])
def test_weights_that_the_user_quantized_are_left(after, assert_close):
    stock, fast = load_stock(), load_fast("balanced")
    if after == "after it":
        draw(fast)
    for pipe in (stock, fast):
        names = ("to_q", "to_k", "to_qkv")
        quantize_(pipe.unet, Int8WeightOnlyConfig(), filter_fn=lambda m, name, names=names: name.endswith(names))
    expected = draw(stock) if after != "after it" else None
    actual = draw(fast)
    if expected is not None:
        assert_close(actual, expected)
    assert "quantized by you" in fast.explain()
    fast.unet.set_attn_processor(AttnProcessor2_0())
    assert_close(draw(fast), actual)


def test_layerwise_casting(assert_close):
    pictures = []
    for pipe in (load_stock(), load_fast("exact"), load_fast("exact")):
        if len(pictures) == 2:
            draw(pipe)
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        pictures.append(draw(pipe))
    assert_close(pictures[1], pictures[0])
    assert_close(pictures[2], pictures[0])
    assert (pictures[0] - draw(load_stock())).abs().max() > 1e-2


def test_the_checkpoint_of_a_whole_pipeline_loads_with_fast_classes(stock, assert_close):
    unet = FastUNet2DConditionModel.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet")
    vae = FastAutoencoderKL.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, subfolder="vae")
    pipe = load_stock(unet=unet, vae=vae)
    assert pipe.unet is unet and pipe.vae is vae
    assert_close(draw(pipe, output_type="pt"), draw(stock, output_type="pt"))
    fast = load_fast("exact", unet=unet, vae=vae)
    assert fast.unet is unet and fast.vae is vae
    assert_close(draw(fast, output_type="pt"), draw(stock, output_type="pt"))
