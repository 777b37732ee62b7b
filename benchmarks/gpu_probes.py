"""What `gpu.py` measures beside the ladder: attention kernels, and one preset with and without CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.bench.ladder import LADDER
from fastdiff.bench.settings import Settings
from fastdiff.bench.stock import load_stock
from fastdiff.bench.timing import spread, timed
from fastdiff.bench.workloads import PROMPT, workload
from fastdiff.graphs import remove_graphs

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CALLS, _ROUNDS, _KERNELS = 10, 5, 20
_MANY_STEPS = 20


def attention_shapes(settings: Settings) -> dict[str, tuple[int, int, int, int, int]]:
    """SDXL's attention at the settings' size: (batch, heads, tokens, context tokens, head_dim)."""
    width, height = settings.size
    pixels, batch = width * height, 2 * settings.batch
    outer, inner, latents = pixels // 16**2, pixels // 32**2, pixels // 8**2
    return {
        "self, outer level": (batch, 10, outer, outer, 64),
        "self, inner level": (batch, 20, inner, inner, 64),
        "cross, outer level": (batch, 10, outer, 77, 64),
        "cross, inner level": (batch, 20, inner, 77, 64),
        "VAE": (settings.batch, 1, latents, latents, 512),
    }


def attention_backends(settings: Settings) -> dict[str, dict[str, float | str]]:
    """Microseconds a call for each shape and backend, or why the backend does not take the shape."""
    return {
        name: {backend: _attention(shape, BACKENDS[backend], settings) for backend in BACKENDS}
        for name, shape in attention_shapes(settings).items()
    }


def _attention(shape: tuple[int, ...], backend: SDPBackend | None, settings: Settings) -> float | str:
    batch, heads, tokens, context, head_dim = shape

    def normal(length: int) -> torch.Tensor:
        # As the projections give it: heads side by side.
        made = torch.randn(batch, length, heads, head_dim, device=settings.device, dtype=settings.dtype)
        return made.transpose(1, 2)

    query, key, value = normal(tokens), normal(context), normal(context)

    def attend() -> None:
        for _ in range(_CALLS):
            F.scaled_dot_product_attention(query, key, value)

    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        try:
            attend()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        seconds = [timed(attend, settings.device)[0] for _ in range(_ROUNDS + 1)]
    return round(min(seconds[1:]) / _CALLS * 1e6, 2)


def probe_preset(name: str, settings: Settings, batches: list[int]) -> dict:
    """Everything about one preset on one pipeline, compiled once.

    Args:
        batches: sizes at which pictures a second are counted, at 20 steps.
    """
    rung = next(rung for rung in LADDER if rung.name == name)
    base = load_stock(settings)
    pipe = rung.build(base, settings)
    plan_s, _ = timed(pipe.explain, settings.device)
    warm_s, _ = timed(lambda: pipe.warmup(sizes=[settings.size], batch_sizes=[settings.batch]), settings.device)
    found = {"warm_up_s": round(plan_s + warm_s, 2)}
    found["times"] = _times(pipe, settings)
    found["encode_s"] = _median(lambda: _encode(pipe), settings)
    found["wait_in_loop"] = wait_in_loop(pipe, settings)
    found["pictures_per_s"] = {str(batch): _throughput(pipe, settings, batch) for batch in batches}
    found["kernels"] = {part: _kernels(workload(part, pipe, settings), settings) for part in ("step", "vae")}
    found["explain"] = pipe.explain().splitlines()
    remove_graphs([pipe.unet, pipe.vae])
    found["times_without_graphs"] = _times(pipe, settings)
    return found


def wait_in_loop(pipe, settings: Settings) -> str | None:
    """What waits for the GPU between the first step and the last, as CUDA's debug mode reports it; None for nothing."""
    if torch.device(settings.device).type != "cuda":
        return "not measured: no CUDA device"
    width, height = settings.size

    def after_step(pipe, index: int, timestep, tensors: dict) -> dict:
        torch.cuda.set_sync_debug_mode("error" if index < settings.steps - 1 else "default")
        return {}

    try:
        pipe(
            PROMPT,
            width=width,
            height=height,
            num_inference_steps=settings.steps,
            callback_on_step_end=after_step,
        )
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _times(pipe, settings: Settings) -> dict[str, dict]:
    times = {}
    for part in ("step", "vae", "picture"):
        function = workload(part, pipe, settings)
        # What is new to it, it compiles or records at its first calls.
        seconds = [timed(function, settings.device)[0] for _ in range(_ROUNDS + 2)]
        times[part] = spread(seconds[2:])
    return times


def _encode(pipe) -> None:
    with torch.no_grad():
        pipe.encode_prompt(PROMPT, negative_prompt="blurry")


def _median(function: Callable[[], object], settings: Settings) -> float:
    return round(statistics.median([timed(function, settings.device)[0] for _ in range(_ROUNDS + 1)][1:]), 5)


def _throughput(pipe, settings: Settings, batch: int) -> float:
    many = workload("picture", pipe, dataclasses.replace(settings, batch=batch), steps=_MANY_STEPS)
    seconds = [timed(many, settings.device)[0] for _ in range(4)]
    return round(batch / min(seconds[1:]), 3)


def _kernels(function: Callable[[], object], settings: Settings) -> list[dict]:
    """Where the time of one call goes: the kernels that take most of it."""
    on_gpu = torch.device(settings.device).type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        timed(function, settings.device)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, attribute), reverse=True)
    return [
        {"name": event.key[:100], "calls": event.count, "ms": round(getattr(event, attribute) / 1e3, 4)}
        for event in events[:_KERNELS]
    ]


def probe_report(probes: dict) -> str:
    """The probes in Markdown."""
    lines = ["| attention, us a call | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for shape, times in probes["attention"].items():
        cells = [f"{time:.1f}" if isinstance(time, float) else "-" for time in times.values()]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    lines += ["", "| preset | warm-up s | graphs | step ms | VAE ms | picture ms | encode ms | pictures/s | waits |"]
    lines.append("|---" * 9 + "|")
    for name, found in probes["presets"].items():
        for graphs, key in (("as planned", "times"), ("off", "times_without_graphs")):
            step, vae, picture = (found[key][part]["median"] * 1e3 for part in ("step", "vae", "picture"))
            row = [name, f"{found['warm_up_s']:.0f}", graphs, f"{step:.2f}", f"{vae:.1f}", f"{picture:.0f}"]
            rates = ", ".join(f"{rate:.2f} at {batch}" for batch, rate in found["pictures_per_s"].items())
            waits = found["wait_in_loop"] or "none"
            row += [f"{found['encode_s'] * 1e3:.1f}", rates, waits] if key == "times" else ["", "", ""]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
