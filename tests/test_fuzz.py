"""Sequences of what users do by hand, stock beside fast: none differs, and none raises where stock does not.

FASTDIFF_FUZZ says how many sequences are drawn; a few by default.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.embedded import draw, load_fast, load_stock
from support.loras import write_lora
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from fastdiff import FastStableDiffusionXLImg2ImgPipeline, FastStableDiffusionXLPipeline

SEQUENCES = int(os.environ.get("FASTDIFF_FUZZ", "10"))


def _scheduler(kind: type) -> Callable:
    def change(pipe, lora):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)

    return change


def _quantize(pipe, lora):
    quantize_(pipe.unet, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "attn" in name)


def _load_lora(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name=f"style{len(getattr(pipe.unet, 'peft_config', {}))}")


def _from_pipe_and_back(kind: type, back: type) -> Callable:
    def change(pipe, lora):
        # Stock casts to float32 where it is not told, the fast classes keep what there is.
        dtype = pipe.unet.dtype
        return back.from_pipe(kind.from_pipe(pipe, torch_dtype=dtype), torch_dtype=dtype)

    return change


# By name: what is done to the stock pipeline, and what to the fast one where that differs.
OPERATIONS: dict[str, tuple[Callable, ...]] = {
    "picture": (lambda pipe, lora: draw(pipe, num_inference_steps=2),),
    "another size": (lambda pipe, lora: draw(pipe, num_inference_steps=2, height=96, num_images_per_prompt=2),),
    "load a LoRA": (_load_lora,),
    "fuse the LoRA": (lambda pipe, lora: pipe.fuse_lora(),),
    "unfuse the LoRA": (lambda pipe, lora: pipe.unfuse_lora(),),
    "unload the LoRA": (lambda pipe, lora: pipe.unload_lora_weights(),),
    "compile blocks": (lambda pipe, lora: pipe.unet.compile_repeated_blocks(fullgraph=True),),
    "quantize": (_quantize,),
    "fuse projections": (lambda pipe, lora: pipe.fuse_qkv_projections(),),
    "unfuse projections": (lambda pipe, lora: pipe.unfuse_qkv_projections(),),
    "processor": (lambda pipe, lora: pipe.unet.set_attn_processor(AttnProcessor2_0()),),
    "default processor": (lambda pipe, lora: pipe.unet.set_attn_processor(AttnProcessor()),),
    "attention slicing": (lambda pipe, lora: pipe.enable_attention_slicing(),),
    "DDIM": (_scheduler(DDIMScheduler),),
    "DPM++": (_scheduler(DPMSolverMultistepScheduler),),
    "ancestral": (_scheduler(EulerAncestralDiscreteScheduler),),
    "from_pipe": (
        _from_pipe_and_back(StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline),
        _from_pipe_and_back(FastStableDiffusionXLImg2ImgPipeline, FastStableDiffusionXLPipeline),
    ),
    "from_pipe of the stock class": (_from_pipe_and_back(StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline),),
    "deepcopy": (lambda pipe, lora: copy.deepcopy(pipe),),
    "float64": (lambda pipe, lora: pipe.to(torch.float64),),
    "float32": (lambda pipe, lora: pipe.to(torch.float32),),
    "channels_last": (lambda pipe, lora: pipe.unet.to(memory_format=torch.channels_last),),
    "edit a weight": (lambda pipe, lora: _halve(pipe),),
    "free u": (lambda pipe, lora: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2),),
}


@torch.no_grad()
def _halve(pipe) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0].weight.mul_(0.5)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return write_lora(load_stock(), tmp_path_factory.mktemp("lora"), seed=1)


@pytest.fixture(scope="module")
def bases():
    return load_stock(), load_fast("exact")


def apply(name: str, pipe, lora, fast: bool):
    """Do one operation; returns the pipeline to go on with, and what was drawn."""
    result = OPERATIONS[name][-1 if fast else 0](pipe, lora)
    if isinstance(result, torch.Tensor):
        return pipe, result
    return (result if hasattr(result, "unet") else pipe), None


def run(names: list[str], bases, lora) -> int:
    """Run a sequence to its end, or to where stock raises; returns how many operations ran."""
    stock, fast = map(copy.deepcopy, bases)
    for pipe in (stock, fast):
        pipe.set_progress_bar_config(disable=True)
    # Stock keeps a copy of what it fuses, which a LoRA does not reach: it is left out without a word.
    if "fuse projections" in names:
        names = [name for name in names if "LoRA" not in name]
    for count, name in enumerate([*names, "picture"]):
        try:
            stock, expected = apply(name, stock, lora, fast=False)
        except Exception:
            return count
        stock.set_progress_bar_config(disable=True)
        fast, actual = apply(name, fast, lora, fast=True)
        fast.set_progress_bar_config(disable=True)
        if expected is not None and expected.isfinite().all():
            assert actual.shape == expected.shape
            difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
            assert difference < 2e-4, f"{names}: {difference} after {name!r}"
    return len(names) + 1


@settings(
    max_examples=SEQUENCES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(names=st.lists(st.sampled_from(list(OPERATIONS)), min_size=2, max_size=5))
def test_sequences(names, bases, lora):
    torch.compiler.reset()
    with torch.compiler.set_stance("default", force_backend="eager"):
        run(names, bases, lora)


@pytest.mark.parametrize(
    "names",
    [
        ["picture", "load a LoRA", "fuse the LoRA", "picture", "unload the LoRA"],
        ["compile blocks", "picture", "another size", "load a LoRA"],
        ["picture", "quantize", "processor", "picture"],
        ["fuse projections", "picture", "edit a weight", "unfuse projections"],
        ["picture", "from_pipe of the stock class", "fuse projections", "deepcopy"],
    ],
    ids=" > ".join,
)
def test_sequences_that_have_to_run_through(names, bases, lora):
    torch.compiler.reset()
    # Both pipelines' graphs of the same stock method count together.
    limit = torch._dynamo.config.patch(recompile_limit=32)
    with torch.compiler.set_stance("default", force_backend="eager"), limit:
        assert run(names, bases, lora) == len(names) + 1
