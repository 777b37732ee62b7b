"""The ladder, defined once: each rung adds one thing to the one before, and peers stand beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from ..config import FastConfig
from ..models.storage import leaves
from ..pipelines.sdxl import FastStableDiffusionXLPipeline
from .names import RUNGS, check_rungs
from .settings import REFERENCE, Settings
from .stock import twin

# What diffusers' guide "Accelerate inference" sets in inductor's global configuration, for this compilation alone.
_RECIPE_CUDA: dict[str, Any] = {
    "max_autotune": True,
    "triton.cudagraphs": True,
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}

Build = Callable[[StableDiffusionXLPipeline, Settings], StableDiffusionXLPipeline]


@dataclass(frozen=True)
class Rung:
    """One way to run the same model.

    Attributes:
        name: how `--rungs` and JSON call it.
        label: how table and plot call it.
        build: makes the pipeline from the shared stock one, without a call of it.
        kind: `"stock"`, `"fastdiff"` or `"peer"`.
        missing: why it cannot run on this machine (a package that is not installed), or None.
    """

    name: str
    label: str
    build: Build
    kind: str = "stock"
    missing: Callable[[Settings], str | None] = lambda settings: None


def _stock(**changes: bool) -> Build:
    return lambda base, settings: twin(base, **changes)


def _recipe(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
    """The guide's steps: channels_last, fused projections, the UNet and the VAE's decoder each as one graph.

    On CUDA with the guide's inductor options. On CPU with inductor's defaults: there the options tune for a GPU, or
    search for longer than the whole ladder takes.
    """
    pipe = twin(base, channels_last=True)
    pipe.fuse_qkv_projections()
    options = _RECIPE_CUDA if torch.device(settings.device).type == "cuda" else None
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, options=options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, options=options)
    return pipe


def _preset(name: str) -> Build:
    def build(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
        # Fusing moves weights within their `Parameter` objects; compiled code of other rungs would see that.
        stock = twin(base, channels_last=True, own_parameters=True)
        pipe = FastStableDiffusionXLPipeline.from_pipe(stock, fast=FastConfig.preset(name, strict=True))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def _compile_repeated_blocks(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
    pipe = twin(base, channels_last=True)
    pipe.unet.compile_repeated_blocks(fullgraph=True)
    return pipe


def _compile_regions(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
    from accelerate.utils import compile_regions

    pipe = twin(base, channels_last=True)
    # Not the UNet itself: it asks `if self.conv_norm_out:`, which a compiled module answers with a TypeError.
    unet = pipe.unet
    unet.mid_block = compile_regions(unet.mid_block)
    for blocks in (unet.down_blocks, unet.up_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = compile_regions(block)
    return pipe


def _openvino(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
    from .openvino import run_in_openvino

    pipe = twin(base, own_parameters=True)
    run_in_openvino(pipe.unet, settings)
    return pipe


def _zentorch(base: StableDiffusionXLPipeline, settings: Settings) -> StableDiffusionXLPipeline:
    import zentorch  # noqa: F401  # registers the compiler's backend of that name

    pipe = twin(base, channels_last=True)
    pipe.fuse_qkv_projections()
    pipe.unet = torch.compile(pipe.unet, backend="zentorch")
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="zentorch")
    return pipe


def _no_compile_regions(settings: Settings) -> str | None:
    import accelerate.utils

    return None if hasattr(accelerate.utils, "compile_regions") else "not installed: accelerate with compile_regions"


def _no_openvino(settings: Settings) -> str | None:
    return _no_peer("openvino", "pip install '.[bench]' in the folder of fastdiff's sources", settings)


def _no_zentorch(settings: Settings) -> str | None:
    return _no_peer("zentorch", "pip install zentorch deprecated, of torch's version, on a CPU of AMD", settings)


def _no_peer(package: str, how: str, settings: Settings) -> str | None:
    if torch.device(settings.device).type != "cpu":
        return "not run: for the CPU only"
    return None if importlib.util.find_spec(package) else f"not installed: {how}"


LADDER: tuple[Rung, ...] = (
    Rung("float32", "stock, float32, attention without SDPA", _stock(float32=True, sdpa=False)),
    Rung("bfloat16", "+ bfloat16", _stock(sdpa=False)),
    Rung("sdpa", "+ SDPA (stock default)", _stock()),
    Rung("channels-last", "+ channels_last", _stock(channels_last=True)),
    Rung("recipe", "+ torch.compile, fused QKV (the guide)", _recipe),
    Rung("exact", 'fastdiff "exact"', _preset("exact"), "fastdiff"),
    Rung("balanced", 'fastdiff "balanced" (default): + quantization where it wins', _preset("balanced"), "fastdiff"),
    Rung("max", 'fastdiff "max"', _preset("max"), "fastdiff"),
    Rung("compile-repeated-blocks", "compile_repeated_blocks (diffusers)", _compile_repeated_blocks, "peer"),
    Rung("compile-regions", "compile_regions by block (accelerate)", _compile_regions, "peer", _no_compile_regions),
    Rung("openvino", "OpenVINO", _openvino, "peer", _no_openvino),
    Rung("zentorch", "zentorch (AMD)", _zentorch, "peer", _no_zentorch),
)


def rungs_for(settings: Settings, names: list[str] | None = None) -> list[Rung]:
    """The rungs to run, in the ladder's order; the reference is always among them.

    Args:
        names: of rungs; None takes all that make sense in the settings' dtype.

    Raises:
        ValueError: a name that is on no rung.
    """
    check_rungs(names or [])
    # In float32 the second rung would be the first one again.
    wanted = set(names or RUNGS) - ({"bfloat16"} if settings.dtype == torch.float32 else set())
    return [rung for rung in LADDER if rung.name in wanted | {REFERENCE}]


def weight_bytes(pipe: StableDiffusionXLPipeline) -> int:
    """Bytes of the pipeline's parameters, each storage counted once."""
    storages = {}
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            for parameter in model.parameters():
                for leaf in leaves(parameter):
                    if leaf.is_mkldnn:
                        # Packed weights show no storage; each is a copy of its own.
                        storages[id(leaf)] = leaf.nbytes
                    else:
                        storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
    return sum(storages.values())
