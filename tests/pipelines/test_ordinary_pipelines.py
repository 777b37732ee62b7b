"""Fast pipelines are ordinary classes: subclassed, copied, handed to stock ones, and called as stock ones are."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from support.embedded import draw, load_fast, load_stock

import fastdiff
from fastdiff import FastConfig, FastStableDiffusionXLPipeline


class Plain(FastStableDiffusionXLPipeline):
    pass


class OwnConstructor(FastStableDiffusionXLPipeline):
    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet,
        scheduler,
        image_encoder=None,
        feature_extractor=None,
        force_zeros_for_empty_prompt: bool = True,
    ):
        models = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler)
        super().__init__(*models, image_encoder, feature_extractor, force_zeros_for_empty_prompt)
        self.mine = 7


class OwnCall(Plain):
    def __call__(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("kind", [Plain, OwnConstructor, OwnCall])
def test_subclasses(kind, stock, assert_close):
    pipe = kind.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32, fast="exact")
    assert type(pipe) is kind and pipe.fast_config == FastConfig.preset("exact")
    for twin in (pipe, copy.deepcopy(pipe), kind.from_pipe(pipe), kind.from_pipe(load_stock(), fast="exact")):
        twin.set_progress_bar_config(disable=True)
        assert_close(draw(twin), draw(stock))
        assert twin.fast_config == FastConfig.preset("exact")
        assert kind is not OwnConstructor or twin.mine == 7
        assert kind is not OwnCall or twin.calls


def test_a_pipeline_pickles_as_stock_ones_do(stock, assert_close):
    twin = pickle.loads(pickle.dumps(load_fast("exact")))
    assert type(twin) is FastStableDiffusionXLPipeline
    assert_close(draw(twin), draw(stock))


@pytest.mark.parametrize("first_picture", [False, True])
def test_stock_pipelines_from_a_fast_one(first_picture, stock, assert_close):
    fast = load_fast("exact")
    if first_picture:
        draw(fast)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(stock)
    for kind, source in ((StableDiffusionXLImg2ImgPipeline, other), (AutoPipelineForImage2Image, other)):
        made = kind.from_pipe(fast)
        assert type(made) is StableDiffusionXLImg2ImgPipeline and made.unet is fast.unet
        call = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "latent", "strength": 0.9}
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        pictures = [p(**call, image=image, generator=g).images for p, g in zip((made, source), seeds, strict=True)]
        assert_close(*pictures)
    back = AutoPipelineForText2Image.from_pipe(made)
    assert_close(draw(back), draw(stock))
    assert_close(draw(fast), draw(stock))


def test_overridden_methods_show_stocks_signatures():
    for name in fastdiff.__all__:
        if not name.endswith("Pipeline"):
            continue
        fast, stock = getattr(fastdiff, name), getattr(diffusers, name.removeprefix("Fast"))
        for method in ("__call__", "encode_prompt", "prepare_extra_step_kwargs", "progress_bar"):
            if hasattr(stock, method):
                assert inspect.signature(getattr(fast, method)) == inspect.signature(getattr(stock, method))
        parameters = list(inspect.signature(fast.__init__).parameters)
        assert parameters == [*inspect.signature(stock.__init__).parameters, "fast"]


def test_inference_mode_keeps_what_is_computed_once(stock, assert_close):
    fast = load_fast("exact")
    seen = []
    attention = fast.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        actual = draw(fast, num_inference_steps=6)
        expected = draw(stock, num_inference_steps=6)
        assert len(seen) == 1
        latents, embeds = torch.randn(1, 4, 8, 8), stock.encode_prompt("a blue star", device="cpu")
        prompt = dict(
            zip(
                ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
                embeds,
                strict=True,
            )
        )
        given = [draw(pipe, prompt=None, latents=latents, **prompt) for pipe in (fast, stock)]
    assert_close(actual, expected)
    assert_close(*given)


def test_a_model_class_of_the_users_own_is_left_as_it_is(stock, assert_close):
    class MyUNet(UNet2DConditionModel):
        def forward(self, *args, **kwargs):
            self.called = True
            return super().forward(*args, **kwargs)

    unet = MyUNet.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet")
    pipe = load_fast("exact", unet=unet)
    assert pipe.unet is unet
    assert_close(draw(pipe), draw(stock))
    assert unet.called and "MyUNet" in pipe.explain()


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_missing_variant_is_told_in_stocks_words(safe_serialization, tmp_path):
    load_stock().save_pretrained(tmp_path, safe_serialization=safe_serialization)
    errors = []
    for kind in (StableDiffusionXLPipeline, FastStableDiffusionXLPipeline):
        with pytest.raises((ValueError, OSError)) as caught:
            kind.from_pretrained(tmp_path, variant="fp16")
        errors.append(caught)
    assert errors[0].type is errors[1].type and str(errors[0].value) == str(errors[1].value)
