"""The parts of a GPU run, the most telling first. Each runs in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_probes import (
    attention_backends,
    both_times,
    copy_gb_per_s,
    error_against,
    group_norms,
    kernels,
    product_tflops,
    regions,
    wait_in_loop,
)
from gpu_record import Part

from fastdiff import EMBEDDED_CHECKPOINT, FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.ladder import LADDER
from fastdiff.bench.machine import machine_info
from fastdiff.bench.settings import Settings
from fastdiff.bench.stock import load_stock, twin
from fastdiff.bench.timing import Memory, timed
from fastdiff.bench.workloads import workload
from fastdiff.graphs import remove_graphs

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("exact", "balanced")
MEASURES = ("picture", "step", "vae")
_MANY_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """One part: what it is for, its share of the time, and what runs."""

    name: str
    seconds: int
    run: Callable[[Part, Settings], None]


def device(part: Part, settings: Settings) -> None:
    """What the hardware gives: the ceilings that all else is measured by."""
    size = 8192 if settings.device == "cuda" else 128
    part.figure("machine", lambda: machine_info(settings.device))
    part.figure("bfloat16 product TFLOP/s", lambda: product_tflops(settings.device, size, size, size, fp8=False))
    if settings.device == "cuda":
        part.figure("fp8 product TFLOP/s", lambda: product_tflops(settings.device, size, size, size, fp8=True))
    part.figure("copy GB/s", lambda: copy_gb_per_s(settings.device, 2**30 if size == 8192 else 2**20))


def tiny(part: Part, settings: Settings) -> None:
    """The embedded model's default call: does it work, and is it right?"""
    load = functools.cache(lambda: load_stock(dataclasses.replace(settings, model=EMBEDDED_CHECKPOINT)))
    for preset in PRESETS:
        pipe = functools.cache(lambda preset=preset: _fast(load(), FastConfig.preset(preset, strict=True)))
        for name, call in (("alone", {}), ("negative prompt", {"negative_prompt": "a green star"})):
            part.figure(f"{preset}, {name}: error against stock",
                        lambda pipe=pipe, call=call: error_against(load(), pipe(), settings, **call))  # fmt: skip
        part.figure(f"{preset}: plan", lambda pipe=pipe: pipe().explain().splitlines())


def tests(part: Part, settings: Settings) -> None:
    """The tests that need a GPU, and those of compiling and of graphs."""
    chosen = ["tests/test_config.py"] if settings.device == "cpu" else ["tests", "-k", "cuda or graph or compile"]

    def run() -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "--no-header", *chosen]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return [f"exit code {result.returncode}", *result.stdout.strip().splitlines()[-25:]]

    part.figure("pytest", run)


def headline(part: Part, settings: Settings) -> None:
    """Stock beside each preset in one process: ratios, first calls, errors, waits, memory, kernels."""
    base = load_stock(settings)
    stock = twin(base)
    for preset in PRESETS:
        # Not strict: what is left after a failure is worth its figures, beside the reason.
        fast = _fast(twin(base, channels_last=True, own_parameters=True), FastConfig.preset(preset))
        _compare(part, preset, stock, fast, settings)
        part.figure(f"{preset}: explain", lambda fast=fast: fast.explain().splitlines())
        remove_graphs([fast.unet, fast.vae])
        for measure in MEASURES:
            name = f"{preset} without graphs: {measure}"
            part.figure(name, lambda fast=fast, m=measure: both_times(m, stock, fast, settings))
        del fast


def _compare(part: Part, name: str, stock, fast, settings: Settings) -> None:
    memory = Memory(settings.device)
    picture = workload("picture", fast, settings)
    part.figure(f"{name}: first picture s", lambda: round(timed(picture, settings.device)[0], 2))
    part.figure(f"{name}: second picture s", lambda: round(timed(picture, settings.device)[0], 2))
    part.figure(f"{name}: failed and taken off", lambda: [s.reason for s in fast.plan if "taken off" in s.reason])
    for measure in MEASURES:
        part.figure(f"{name}: {measure}", lambda m=measure: both_times(m, stock, fast, settings))
    part.figure(f"{name}: error against stock", lambda: error_against(stock, fast, settings))
    part.figure(f"{name}: waits in the loop", lambda: wait_in_loop(fast, settings) or "none")
    memory.reset_peak()
    part.figure(f"{name}: peak GiB", lambda: (picture(), round((memory.peak() or 0) / 2**30, 2))[1])
    for measure in ("step", "vae"):
        part.figure(f"{name}: kernels of {measure}", lambda m=measure: kernels(workload(m, fast, settings), settings))
    many = workload("picture", fast, settings, steps=_MANY_STEPS)
    seconds = part.figure(f"{name}: {_MANY_STEPS} steps s", lambda: round(min(_times(many, settings)), 4))
    if seconds:
        part.figure(f"{name}: pictures/s at {_MANY_STEPS} steps", lambda: round(settings.batch / seconds, 3))


def batch8(part: Part, settings: Settings) -> None:
    """As the headline, for eight pictures a call."""
    settings = dataclasses.replace(settings, batch=2 if settings.device == "cpu" else 8)
    base = load_stock(settings)
    for preset in PRESETS:
        fast = _fast(twin(base, channels_last=True, own_parameters=True), FastConfig.preset(preset))
        _compare(part, preset, twin(base), fast, settings)


def peers(part: Part, settings: Settings) -> None:
    """diffusers' own regional compiling, SDNQ where it is installed, and the guide without its longest searches."""
    base = load_stock(settings)
    stock = twin(base)
    on_cuda = settings.device == "cuda"

    def guide() -> object:
        pipe = twin(base, channels_last=True)
        pipe.fuse_qkv_projections()
        options = {"triton.cudagraphs": True, "conv_1x1_as_mm": True, "epilogue_fusion": False} if on_cuda else None
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, options=options)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, options=options)
        return pipe

    def sdnq(dtype: str) -> object:
        from sdnq import sdnq_post_load_quant

        pipe = twin(base, channels_last=True, own_parameters=True)
        pipe.unet = sdnq_post_load_quant(pipe.unet, weights_dtype=dtype, use_quantized_matmul=True)
        return pipe

    repeated = next(rung for rung in LADDER if rung.name == "compile-repeated-blocks")
    built: dict[str, Callable[[], object]] = {"compile_repeated_blocks": lambda: repeated.build(base, settings)}
    if on_cuda:
        built["guide without max-autotune and coordinate descent"] = guide
    if importlib.util.find_spec("sdnq") is not None:
        built.update({f"SDNQ {dtype}": functools.partial(sdnq, dtype) for dtype in ("int8", "float8_e4m3fn")})
    else:
        part.figure("SDNQ", lambda: "not installed")
    for name, build in built.items():
        pipe = functools.cache(build)
        part.figure(f"{name}: first picture s", functools.partial(_first_picture, pipe, settings))
        for measure in MEASURES:
            part.figure(f"{name}: {measure}", lambda p=pipe, m=measure: both_times(m, stock, p(), settings))
        torch._dynamo.reset()


def pieces(part: Part, settings: Settings) -> None:
    """One region of each kind in all its forms, attention by backend, products by dtype, GroupNorm by kernel."""
    for name, measure in regions(settings).items():
        part.figure(f"region us: {name}", measure)
    part.figure("GroupNorm with SiLU us", lambda: group_norms(settings))
    part.figure("attention us", lambda: attention_backends(settings))
    rows = (2048, 8192) if settings.device == "cuda" else (64,)
    for count in rows:
        for features, width in ((1280, 10240), (5120, 1280), (640, 5120)) if settings.device == "cuda" else ((64, 64),):
            for fp8 in (False, True) if settings.device == "cuda" else (False,):
                name = f"{'fp8' if fp8 else 'bfloat16'} {count}x{features}x{width} TFLOP/s"
                part.figure(name, lambda c=count, f=features, w=width, q=fp8: product_tflops(
                    settings.device, c, f, w, fp8=q))  # fmt: skip


def recipe(part: Part, settings: Settings) -> None:
    """The whole guide, whose searches take minutes, on warm caches where there are some."""
    if settings.device == "cpu":
        part.figure("recipe", lambda: "not in a dry run: it compiles for minutes")
        return
    base = load_stock(settings)
    pipe = functools.cache(lambda: next(rung for rung in LADDER if rung.name == "recipe").build(base, settings))
    stock = twin(base)
    part.figure("first picture s", functools.partial(_first_picture, pipe, settings))
    for measure in MEASURES:
        part.figure(f"recipe: {measure}", lambda m=measure: both_times(m, stock, pipe(), settings))


PARTS = (
    Plan("device", 60, device),
    Plan("tiny", 120, tiny),
    Plan("headline", 540, headline),
    Plan("pieces", 240, pieces),
    Plan("tests", 300, tests),
    Plan("batch8", 540, batch8),
    Plan("peers", 540, peers),
    Plan("recipe", 560, recipe),
)


def _fast(stock, config: FastConfig):
    pipe = FastStableDiffusionXLPipeline.from_pipe(stock, fast=config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first_picture(make: Callable[[], object], settings: Settings) -> float:
    return round(timed(workload("picture", make(), settings), settings.device)[0], 2)


def _times(function: Callable[[], object], settings: Settings) -> list[float]:
    return [timed(function, settings.device)[0] for _ in range(4)][1:]


