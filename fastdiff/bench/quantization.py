"""What quantization costs in quality: layers, the UNet's output, and the pictures of the embedded model.

    python -m fastdiff.bench.quantization unet --size 256 --json errors.json    # full-size SDXL, random weights
    python -m fastdiff.bench.quantization pictures --count 100 --json pictures.json

`unet` names the layers whose output moves most, and compares the UNet's output with float32. `pictures` draws held-out
captions with the embedded checkpoint in bfloat16, plain and quantized; all of its layers are narrower than what the
schemes take by default, so every layer that is eligible by role is quantized there. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torchao.quantization import quantize_

from .. import EMBEDDED_CHECKPOINT
from ..config import FastConfig
from ..models.unet import FastUNet2DConditionModel
from ..pipelines.sdxl import FastStableDiffusionXLPipeline
from ..weights import apply_quantization, plain_layers
from ..weights.int8 import Int8Conv2d, Int8Linear
from ..weights.quantization import uses_onednn
from ..weights.torchao_form import torchao_config
from .machine import machine_info
from .sdxl_random import random_unet
from .settings import SDXL_RANDOM, Settings
from .workloads import step_inputs

CPU_SCHEMES = ("int8-dynamic", "int8-weight-only")


@torch.no_grad()
def layer_errors(
    unet: UNet2DConditionModel, inputs: dict, scheme: str, min_weights: int = 512 * 512
) -> dict[str, dict[str, float]]:
    """How far each quantized layer's output is from float32's, on the inputs that it really gets.

    Args:
        unet: plain, fused as it will run; it is left as it is.
        inputs: of one forward.
        scheme: to take the layers of.
        min_weights: see `apply_quantization`.

    Returns:
        By name, worst first: `"quantized"` and `"plain"`, each |difference| / |float32 output|.
    """
    layers, _ = plain_layers(unet, scheme, min_weights)
    found: dict[str, dict[str, float]] = {}
    with _watched(layers, lambda name, layer, x, y: found.update({name: _errors(layer, x, y, scheme)})):
        unet(**inputs)
    return dict(sorted(found.items(), key=lambda item: -item[1]["quantized"]))


@torch.no_grad()
def output_errors(
    make_unet: Callable[[], UNet2DConditionModel], settings: Settings, schemes: tuple[str, ...]
) -> dict[str, dict]:
    """|difference| / |float32 output| of a UNet in bfloat16 and with each scheme, its sizes, and its worst layers.

    Args:
        make_unet: makes the same plain UNet in bfloat16 each time; one is held at a time.
        settings: of the step whose output is compared, in bfloat16.
        schemes: of `FastConfig.quantization`.
    """
    # In place and exact: every bfloat16 is a float32.
    unet = make_unet().float()
    reference = unet(**step_inputs(unet, settings)).sample
    unet = unet.bfloat16()
    rows: dict[str, dict[str, Any]] = {}
    rows["bfloat16"] = {"error": _distance(unet(**step_inputs(unet, settings)).sample, reference)}
    for scheme in schemes:
        fast = FastUNet2DConditionModel.from_stock(unet or make_unet())
        unet = None
        fast.fuse_qkv_projections()
        inputs = step_inputs(fast, settings)
        errors = layer_errors(fast, inputs, scheme)
        done = apply_quantization(fast, scheme)
        rows[scheme] = {
            "error": _distance(fast(**inputs).sample, reference),
            "layers": done.taken,
            "layer_bytes": [done.bytes_before, done.bytes_after],
            "unet_bytes": [done.model_before, done.model_after],
            "median_layer": statistics.median(row["quantized"] for row in errors.values()),
            "worst_layers": dict(list(errors.items())[:10]),
        }
        del fast
        gc.collect()
    return rows


def picture_rows(schemes: tuple[str, ...], count: int, steps: int, batch: int) -> list[dict]:
    """Adherence of the embedded model's pictures by the oracle, and PSNR and SSIM to bfloat16 without quantization."""
    from ..shapes.captions import caption
    from ..shapes.training import evaluate
    from ..shapes.training.oracle import judge

    scenes = evaluate.held_out_scenes(count)
    rows: list[dict] = []
    reference: list = []
    for scheme in ("none", *schemes):
        fast = FastConfig.preset("balanced", dtype=torch.bfloat16, quantization=scheme)
        pipe = FastStableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, fast=fast)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.plan, "fuses, and finds every layer too small"
        layers = 0 if scheme == "none" else apply_quantization(pipe.unet, scheme, min_weights=1).taken
        captions = [caption(scene) for scene in scenes]
        pictures = evaluate.draw(pipe, captions, batch, steps, evaluate.GUIDANCE_SCALE)
        reference = reference or pictures
        verdicts = [judge(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
        row = evaluate.summarize(scheme, scenes, verdicts, pictures, reference)
        rows.append({key.replace("vs_stock", "vs_bfloat16"): value for key, value in row.items()} | {"layers": layers})
        print(json.dumps(rows[-1]), flush=True)
    return rows


@contextmanager
def _watched(layers: dict[str, nn.Linear], look: Callable[..., None]) -> Iterator[None]:
    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: look(name, layer, args[0], output))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _errors(layer: Any, x: torch.Tensor, plain: torch.Tensor, scheme: str) -> dict[str, float]:
    # Copies have the hooks, too.
    twin = copy.deepcopy(layer)
    reference = copy.deepcopy(layer).float().forward(x.float())
    if not uses_onednn(scheme, layer):
        quantize_(twin, torchao_config(scheme))
    elif isinstance(layer, nn.Conv2d):
        Int8Conv2d.make(twin)
    else:
        Int8Linear.make(twin)
    return {"quantized": _distance(twin.forward(x), reference), "plain": _distance(plain, reference)}


def _distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference).norm() / reference.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("unet", "pictures"))
    parser.add_argument("--schemes", nargs="+", default=CPU_SCHEMES, help="(default: those that a CPU runs)")
    parser.add_argument("--size", type=int, default=256, help="pixels of an edge, for unet")
    parser.add_argument("--count", type=int, default=100, help="captions, for pictures")
    parser.add_argument("--steps", type=int, default=20, help="for pictures")
    parser.add_argument("--batch", type=int, default=8, help="for pictures")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    result: Any
    if arguments.what == "unet":
        settings = Settings(model=SDXL_RANDOM, size=(arguments.size, arguments.size), device="cpu")
        result = output_errors(random_unet, settings, tuple(arguments.schemes))
        print(json.dumps(result, indent=1))
    else:
        result = picture_rows(tuple(arguments.schemes), arguments.count, arguments.steps, arguments.batch)
    if arguments.json:
        about = {"what": arguments.what, "date": date.today().isoformat(), "machine": machine_info()}
        size = {"size": arguments.size} if arguments.what == "unet" else {"steps": arguments.steps}
        arguments.json.write_text(json.dumps({**about, **size, "rows": result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
