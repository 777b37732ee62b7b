"""Prompt adherence of the tiny SDXL on captions it was never trained on, stock and fast.

    python -m fastdiff.shapes.training.evaluate --variants stock exact balanced --json results.json --grid grid.png

A variant is `stock`, a preset, or a preset with fields replaced: `balanced:compile=off,quantization=int8-dynamic`.
`stock:dtype=bfloat16` is the stock pipeline in that dtype. Every variant draws the same captions from the same
seeds; the oracle judges each picture, and PSNR and SSIM compare it with the stock pipeline's in float32.
Rows of an existing JSON are kept, those of the same variant replaced. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from ... import EMBEDDED_CHECKPOINT
from ..captions import Scene, caption, sample_scene
from .grids import save_grid, save_strip
from .oracle import Verdict, judge

GUIDANCE_SCALE = 5.0
STEPS = 20
CAPTION_SEED = 7
"""Chooses the captions; the same 200 for every result of the project."""
TWO_THINGS = 0.25
_ATTRIBUTES = ("shape", "colour", "background", "position", "size")
_PACKAGES = ("torch", "diffusers", "transformers", "torchao", "scikit-image", "fastdiff")


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` distinct scenes of the evaluation, each with a combination absent from training."""
    rng = random.Random(CAPTION_SEED)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes.setdefault(sample_scene(rng, held_out=True, two_things=TWO_THINGS))
    return list(scenes)


def load_variant(variant: str, model: str, device: str) -> DiffusionPipeline:
    """Load the pipeline a variant names.

    Raises:
        ValueError: a malformed variant, an unknown preset or field, or a field other than dtype for `stock`.
    """
    name, fields = parse_variant(variant)
    if name == "stock":
        if set(fields) - {"dtype"}:
            raise ValueError(f"variant {variant!r}: stock takes no field but dtype, e.g. stock:dtype=bfloat16")
        pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=fields.get("dtype", torch.float32))
    else:
        from ... import FastConfig, FastStableDiffusionXLPipeline

        config = FastConfig.preset(name, **fields)
        pipeline = FastStableDiffusionXLPipeline.from_pretrained(model, fast=config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def parse_variant(variant: str) -> tuple[str, dict[str, object]]:
    """Split `name:field=value,field=value`; values are Python literals, dtypes of torch, or plain words."""
    name, _, rest = variant.partition(":")
    fields: dict[str, str] = {}
    # A comma inside a pair such as (0.1, 0.8) belongs to the value: a new field starts only at `name=`.
    for part in rest.replace(" ", "").split(",") if rest else ():
        key, found, value = part.partition("=")
        if found:
            fields[key] = value
        elif fields:
            fields[next(reversed(fields))] += f",{part}"
        else:
            raise ValueError(f"variant {variant!r}: expected field=value after the colon, not {part!r}")
    return name, {key: _value(key, text) for key, text in fields.items()}


def draw(
    pipeline: DiffusionPipeline, captions: list[str], batch: int, steps: int, guidance_scale: float
) -> list[np.ndarray]:
    """Draw each caption with its index as the seed. Returns uint8 pictures of shape (height, width, 3)."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(start + index) for index in range(len(part))]
        images = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators
        ).images
        pictures += [np.asarray(image) for image in images]
    return pictures


def summarize(
    variant: str, scenes: list[Scene], verdicts: list[Verdict], pictures: list[np.ndarray], reference: list[np.ndarray]
) -> dict[str, object]:
    """One row of the results: shares of 0 to 1, decibels for PSNR, None where a picture equals the reference."""
    from skimage.metrics import structural_similarity

    row: dict[str, object] = {"variant": variant, "captions": len(scenes)}
    row["satisfied"] = _share([verdict.satisfied for verdict in verdicts])
    for name in _ATTRIBUTES:
        row[name] = _share([getattr(verdict, name) for verdict in verdicts])
    for name, pair in (("satisfied_one_thing", False), ("satisfied_two_things", True)):
        row[name] = _share([v.satisfied for s, v in zip(scenes, verdicts, strict=True) if (len(s.things) == 2) == pair])
    errors = [np.mean((one.astype(float) - other) ** 2) for one, other in zip(pictures, reference, strict=True)]
    # The mean of decibels would be infinite as soon as one picture is equal: average the errors first.
    mean_error = float(np.mean(errors))
    row["psnr_vs_stock_db"] = round(10 * np.log10(255**2 / mean_error), 2) if mean_error else None
    similar = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(pictures, reference, strict=True)]
    row["ssim_vs_stock"] = round(float(np.mean(similar)), 4)
    row["identical_pictures"] = _share([error == 0 for error in errors])
    return row


def write_rows(path: Path, rows: list[dict[str, object]], device: str) -> None:
    """Write the rows, keeping those of other variants that the file already holds."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    fresh = {row["variant"] for row in rows}
    result = {
        "what": "adherence of the embedded checkpoint to held-out captions, judged by fastdiff.shapes.training.oracle",
        "hardware": _hardware(device),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in _PACKAGES if _installed(name)},
        "rows": [row for row in kept if row["variant"] not in fresh] + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def evaluate(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Draw and judge every variant; the stock pipeline in float32 comes first, as the reference."""
    scenes = held_out_scenes(arguments.count)
    captions = [caption(scene) for scene in scenes]
    rows, drawn = [], {}
    reference: list[np.ndarray] = []
    # Stock in float32 is drawn even where it is no variant: the others are compared with it.
    for variant in dict.fromkeys(["stock", *arguments.variants]):
        pipeline = load_variant(variant, arguments.model, arguments.device)
        started = time.perf_counter()
        pictures = draw(pipeline, captions, arguments.batch, arguments.steps, arguments.guidance_scale)
        seconds = time.perf_counter() - started
        reference = reference or pictures
        if variant not in arguments.variants:
            continue
        verdicts = [judge(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
        row = summarize(variant, scenes, verdicts, pictures, reference)
        row |= {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale, "batch": arguments.batch}
        row |= {"dtype": str(pipeline.unet.dtype).removeprefix("torch."), "seconds": round(seconds, 1)}
        row |= {"scheduler": type(pipeline.scheduler).__name__, "device": arguments.device}
        print(json.dumps(row))
        rows.append(row)
        drawn[variant] = pictures
        if arguments.grid and len(rows) == 1:
            shown = slice(arguments.grid_pictures)
            save_grid(arguments.grid, scenes[shown], pictures[shown], verdicts[shown])
    if arguments.strip:
        save_strip(arguments.strip, drawn, min(8, len(scenes)))
    if arguments.json:
        write_rows(arguments.json, rows, arguments.device)
    return rows


def _value(key: str, text: str) -> object:
    if key == "dtype" and isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _share(flags: list[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["stock"], help="see the module's text (default: stock)")
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="checkpoint (default: the embedded one)")
    parser.add_argument("--count", type=int, default=200, help="how many held-out captions")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the rows to, or to add them to")
    parser.add_argument("--grid", type=Path, help="PNG of the first variant's pictures and captions")
    parser.add_argument("--grid-pictures", type=int, default=40)
    parser.add_argument("--strip", type=Path, help="PNG with one row of pictures for each variant")
    evaluate(parser.parse_args())


if __name__ == "__main__":
    main()
