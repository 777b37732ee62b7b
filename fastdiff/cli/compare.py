"""`fastdiff generate --compare`: the same prompt by stock diffusers and by fastdiff, timed in turn."""

from __future__ import annotations

import argparse
import time

from .pictures import draw, psnr, save, side_by_side

ROUNDS = 5
# A second copy in float32 of a model beyond this would need more memory, and more patience, than a comparison is worth.
_SMALL_PARAMETERS = 100_000_000
FULL_SIZE = "fastdiff demo"


def compare(arguments: argparse.Namespace, pipe, call: dict) -> int:
    """Draw with each, write the pictures side by side, and print times and what came of them."""
    from ..bench.timing import spread

    rivals = {**_stock_pipelines(arguments, pipe), "fast": pipe}
    pictures, seconds = _in_turn(rivals, call)
    labels = {
        name: f"{name.partition(',')[0]}, {_dtype(rival)}, {spread(seconds[name])['median']:.2f} s"
        for name, rival in rivals.items()
    }
    strips = [side_by_side(each, list(labels.values())) for each in zip(*pictures.values(), strict=True)]
    for index, path in enumerate(save(strips, arguments.output)):
        fast, stock = pictures["fast"][index], pictures["stock"][index]
        print(f"wrote {path} (seed {call['seeds'][index]}), PSNR to stock {psnr(fast, stock):.1f} dB")
    for name, label in labels.items():
        ratios = spread([theirs / own for theirs, own in zip(seconds[name], seconds["fast"], strict=True)])
        beside = "" if name == "fast" else f"  {name} / fast = {describe_ratio(ratios)}"
        print(f"  {label}{beside}")
    print(f"each drawn {ROUNDS} times in turn, after a first call; medians, least to greatest in brackets")
    if _parameters(pipe) < _SMALL_PARAMETERS:
        print(f"this model is too small to gain much: calling its operators takes longer than they do; `{FULL_SIZE}` "
              "times SDXL at full size")
    return 0


def describe_ratio(ratios: dict) -> str:
    """A ratio with its spread; where the spread has 1 within it, nothing was shown."""
    from ..bench.table import ratio, shows_nothing

    return f"{ratio(ratios)}, no difference beyond the spread" if shows_nothing(ratios) else ratio(ratios)


def _stock_pipelines(arguments: argparse.Namespace, pipe) -> dict:
    """Stock in the fast pipeline's dtype, and where the model is small in its own default, float32, too."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    dtypes = {"stock": pipe.unet.dtype}
    if pipe.unet.dtype != torch.float32 and _parameters(pipe) < _SMALL_PARAMETERS:
        dtypes = {"stock, float32": torch.float32, **dtypes}
    options = {"use_safetensors": True, "local_files_only": not arguments.online}
    return {
        name: StableDiffusionXLPipeline.from_pretrained(arguments.model, dtype=dtype, **options).to(pipe.device)
        for name, dtype in dtypes.items()
    }


def _in_turn(rivals: dict, call: dict) -> tuple[dict, dict]:
    from tqdm.auto import tqdm

    pictures: dict[str, list] = {}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    with tqdm(total=len(rivals) * (ROUNDS + 1), unit="call", desc="in turn", leave=False) as bar:
        for round_ in range(ROUNDS + 1):
            for name, rival in rivals.items():
                before = time.perf_counter()
                pictures[name] = draw(rival, call, bar=False)
                if round_:  # the first call compiles, and fills caches
                    seconds[name].append(time.perf_counter() - before)
                bar.update()
    return pictures, seconds


def _parameters(pipe) -> int:
    return sum(parameter.numel() for parameter in pipe.unet.parameters())


def _dtype(pipe) -> str:
    return str(pipe.unet.dtype).removeprefix("torch.")
