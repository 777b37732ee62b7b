"""Packages and pipelines of others, over the fast classes as over the stock ones.

A package that is not installed is skipped. The community pipelines are those of a clone of diffusers, which the
environment variable FASTDIFF_UPSTREAM names.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.embedded import draw, load_fast, load_stock

import fastdiff
from fastdiff import FastAutoencoderKL, FastConfig, FastUNet2DConditionModel
from fastdiff.models.form import count_forms
from fastdiff.weights.int8_units import int8_units

needs_int8 = pytest.mark.skipif(int8_units() is None, reason="needs AVX2, VNNI or AMX")
FORMS = [{}, {"pack_weights": True}, pytest.param({"quantization": "int8-dynamic"}, marks=needs_int8)]
COMMUNITY = Path(os.environ.get("FASTDIFF_UPSTREAM", "")) / "examples" / "community"


def pair():
    return load_stock(), load_fast("exact")


def test_compel(assert_close):
    compel = pytest.importorskip("compel")
    pictures = []
    for pipe in pair():
        weighting = compel.Compel(
            tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
            text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
            returned_embeddings_type=compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            requires_pooled=[False, True],
        )
        embeds, pooled = weighting("a red++ circle on a (blue)0.6 background")
        pictures.append(draw(pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=1.0))
        pictures.append(draw(pipe))
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2
    assert_close(pictures[2], pictures[0])
    assert_close(pictures[3], pictures[1])


@pytest.mark.parametrize("first_picture", [False, True])
def test_tomesd(first_picture, assert_close):
    tomesd = pytest.importorskip("tomesd")
    pictures = []
    for pipe in pair():
        plain = draw(pipe) if first_picture else None
        # Merging draws its destinations at random, from the generator of the device.
        torch.manual_seed(0)
        tomesd.apply_patch(pipe, ratio=0.5, max_downsample=4)
        pictures.append(draw(pipe))
        tomesd.remove_patch(pipe)
        if first_picture:
            assert (pictures[-1] - plain).abs().max() > 1e-3
            assert_close(draw(pipe), plain)
    assert_close(pictures[1], pictures[0])


@pytest.mark.parametrize("first_picture", [False, True])
def test_deepcache(first_picture, assert_close):
    deepcache = pytest.importorskip("DeepCache")
    pictures = []
    for pipe in pair():
        plain = draw(pipe, num_inference_steps=6) if first_picture else None
        helper = deepcache.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        pictures.append(draw(pipe, num_inference_steps=6))
        helper.disable()
        if first_picture:
            assert (pictures[-1] - plain).abs().max() > 1e-3
            assert_close(draw(pipe, num_inference_steps=6), plain)
    assert_close(pictures[1], pictures[0])


@pytest.mark.parametrize("first_picture", [False, True])
def test_optimum_quanto(first_picture, assert_close):
    quanto = pytest.importorskip("optimum.quanto")
    pictures = []
    for pipe in pair():
        if first_picture:
            draw(pipe)
        quanto.quantize(pipe.unet, weights=quanto.qint8)
        quanto.freeze(pipe.unet)
        pictures.append(draw(pipe))
        pictures.append(draw(pipe, height=96))
    assert_close(pictures[2], pictures[0], tolerance=1e-3)
    assert_close(pictures[3], pictures[1], tolerance=1e-3)
    assert (pictures[0] - draw(load_stock())).abs().max() > 1e-3


def test_bitsandbytes(assert_close):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pictures = []
    for pipe in pair():
        for module in list(pipe.unet.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and child.in_features % 64 == 0:
                    bits = bitsandbytes.nn.Linear4bit(
                        child.in_features, child.out_features, child.bias is not None, torch.float32, quant_type="nf4"
                    )
                    bits.load_state_dict(child.state_dict())
                    setattr(module, name, bits.to("cpu"))
        try:
            pictures.append(draw(pipe))
        except (RuntimeError, NotImplementedError) as error:
            if not pictures:
                pytest.skip(f"4-bit products do not run here: {error}")
            raise
    assert_close(pictures[1], pictures[0])
    assert "quantized by you" in pipe.explain()


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_accelerate_hooks(forms, assert_close):
    accelerate = pytest.importorskip("accelerate")
    stock, fast = load_stock(), load_fast(FastConfig.preset("exact", tuning="off", **forms))
    first = draw(fast)
    pictures = []
    for pipe in (stock, fast):
        draw(pipe)
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        pictures.append(draw(pipe))
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
        pictures.append(draw(pipe))
    assert_close(pictures[2], pictures[0])
    assert_close(pictures[3], first)
    if forms:
        assert count_forms(fast.unet), "after a picture the forms that the plan made anew are still there"


@pytest.mark.parametrize("first_picture", [False, True])
def test_peft_add_adapter(first_picture, assert_close):
    from peft import LoraConfig

    pictures = []
    for pipe in pair():
        if first_picture:
            draw(pipe)
        torch.manual_seed(0)
        pipe.unet.add_adapter(
            LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(pipe.unet.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        pictures.append(draw(pipe))
    assert (pictures[0] - draw(load_stock())).abs().max() > 1e-2
    assert_close(pictures[1], pictures[0])


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (64, 64, len(mode) if mode == "RGB" else 1), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode=mode)


def community_call(name: str) -> dict:
    plain = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "np"}
    sized = {**plain, "height": 64, "width": 64}
    source = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {
        "lpw_stable_diffusion_xl": {**sized, "prompt": "a (red:1.4) circle on a [blue] background"},
        "masked_stable_diffusion_xl_img2img": {
            **plain, "image": picture(0), "original_image": picture(1), "strength": 0.9,
        },
        "mixture_tiling_sdxl": {
            **plain, "prompt": [["a red circle", "a blue star"]], "height": 64, "width": 96, "tile_height": 64,
            "tile_width": 64, "tile_row_overlap": 0, "tile_col_overlap": 32, "guidance_scale_tiles": [[5.0, 5.0]],
            "seed_tiles": [[1, 2]],
        },
        "pipeline_sdxl_style_aligned": {**sized, "prompt": ["a red circle", "a blue star"]},
        "pipeline_stable_diffusion_xl_differential_img2img": {
            **plain, "image": source, "original_image": source, "map": torch.rand(1, 64, 64), "strength": 1.0,
        },
        "stable_diffusion_xl_reference": {**sized, "ref_image": picture(2), "reference_adain": True},
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "lpw_stable_diffusion_xl",
        "masked_stable_diffusion_xl_img2img",
        "mixture_tiling_sdxl",
        "pipeline_sdxl_style_aligned",
        "pipeline_stable_diffusion_xl_differential_img2img",
        "stable_diffusion_xl_reference",
    ],
)
def test_community_pipelines(name):
    file = COMMUNITY / f"{name}.py"
    if not file.is_file():
        pytest.skip("FASTDIFF_UPSTREAM names no clone of diffusers")
    pictures = []
    for components in (
        {},
        {
            "unet": FastUNet2DConditionModel.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet"),
            "vae": FastAutoencoderKL.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, subfolder="vae"),
        },
    ):
        try:
            pipe = DiffusionPipeline.from_pretrained(
                fastdiff.EMBEDDED_CHECKPOINT,
                custom_pipeline=str(file),
                trust_remote_code=True,
                torch_dtype=torch.float32,
                **components,
            )
        except ImportError as error:
            pytest.skip(f"needs another package: {error}")
        pipe.set_progress_bar_config(disable=True)
        if name == "lpw_stable_diffusion_xl":
            # It writes the numbers of CLIP's own tokens.
            for encoder in (pipe.text_encoder, pipe.text_encoder_2):
                torch.manual_seed(0)
                encoder.resize_token_embeddings(49408)
        if name == "pipeline_sdxl_style_aligned":
            pipe.enable_style_aligned()
        for _ in range(2):
            torch.manual_seed(0)
            try:
                images = pipe(**community_call(name), generator=torch.Generator().manual_seed(0))
            except Exception as error:
                if not components:
                    pytest.skip(f"stock raises {type(error).__name__}: {str(error)[:150]}")
                raise
            pictures.append(np.asarray(images[0] if isinstance(images, tuple) else images.images))
    assert pictures[0].std() > 0.01
    for index in (0, 1):
        assert np.abs(pictures[index + 2] - pictures[index]).max() < 2e-3
