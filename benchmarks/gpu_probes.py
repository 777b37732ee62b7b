"""How `gpu.py` measures: ratios, errors, waits, kernels, and single pieces of the work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchao.quantization import quantize_

from fastdiff.bench.settings import Settings
from fastdiff.bench.timing import spread, timed
from fastdiff.bench.workloads import PROMPT, workload
from fastdiff.compiler.compilation import inductor_options
from fastdiff.models.group_norm import define_operator
from fastdiff.weights.torchao_form import torchao_config

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CALLS, _ROUNDS, _KERNELS = 10, 5, 20


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


def both_times(measure: str, stock, fast, settings: Settings) -> dict:
    """Stock and fast timed in turn: seconds of both, and the ratio of each pair."""
    functions = {name: workload(measure, pipe, settings) for name, pipe in (("stock", stock), ("fast", fast))}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        # What is new to it, it compiles or records at its first calls.
        for _ in range(3):
            timed(function, settings.device)
    for _ in range(settings.rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function, settings.device)[0])
    ratios = [one / other for one, other in zip(seconds["stock"], seconds["fast"], strict=True)]
    return {"ratio": spread(ratios, 3), **{name: spread(values) for name, values in seconds.items()}}


def error_against(stock, fast, settings: Settings, **call) -> dict:
    """Relative distance of latents and picture from stock's, with the same seed on the same device."""
    width, height = settings.size
    shared = {"prompt": PROMPT, "width": width, "height": height, "num_inference_steps": settings.steps, **call}
    errors = {}
    for kind in ("latent", "pt"):
        results = [
            pipe(**shared, output_type=kind, generator=torch.Generator().manual_seed(0)).images.float()
            for pipe in (stock, fast)
        ]
        if not torch.isfinite(results[1]).all():
            raise RuntimeError(f"{kind}: the fast pipeline's result is not finite")
        errors[kind] = float(f"{((results[1] - results[0]).norm() / results[0].norm()).item():.3g}")
    return errors


def product_tflops(device: str, rows: int, features: int, width: int, fp8: bool) -> float:
    """Speed of (rows, features) x (features, width), bfloat16 or float8 with a scale a row: the best of five runs."""
    left = torch.randn(rows, features, device=device, dtype=torch.bfloat16)
    right = torch.randn(width, features, device=device, dtype=torch.bfloat16).t()
    if fp8:
        kind = torch.float8_e4m3fn
        scales = [torch.ones(shape, device=device) for shape in ((rows, 1), (1, width))]
        left, right = left.to(kind), right.to(kind)

    def multiply() -> None:
        for _ in range(_CALLS):
            if fp8:
                torch._scaled_mm(left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
            else:
                left @ right

    seconds = [timed(multiply, device)[0] for _ in range(_ROUNDS + 1)]
    return round(2 * rows * features * width * _CALLS / min(seconds[1:]) / 1e12, 3)


def copy_gb_per_s(device: str, count: int) -> float:
    """Bytes read and written a second by a copy of `count` bytes."""
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[0] for _ in range(_ROUNDS + 1)]
    return round(2 * count / min(seconds[1:]) / 1e9, 1)


def group_norms(settings: Settings) -> dict[str, dict[str, float | str]]:
    """GroupNorm and SiLU of channels_last pictures: PyTorch's functions beside our operator."""
    width, height = settings.size
    operator, found = define_operator(), {}
    for channels, level in ((320, 8), (640, 16), (1280, 32), (128, 1), (512, 8)):
        samples = 2 * settings.batch if level in (8, 16, 32) and channels != 512 else settings.batch
        kind = {"device": settings.device, "dtype": settings.dtype}
        x = torch.randn(samples, channels, height // level, width // level, **kind)
        x = x.to(memory_format=torch.channels_last)
        scale, shift = (torch.randn(channels, **kind) for _ in range(2))
        plain = functools.partial(lambda x, *p: F.silu(F.group_norm(x, 32, *p)), x, scale, shift)
        ours = functools.partial(operator, x, 32, scale, shift, 1e-5, True)
        error = (ours().float() - plain().float()).abs().max().item()
        times = {name: _microseconds(function, settings) for name, function in (("PyTorch", plain), ("ours", ours))}
        found[f"{tuple(x.shape)}"] = {**times, "largest difference": round(error, 5)}
    return found


def regions(settings: Settings) -> dict[str, Callable[[], float]]:
    """One ResNet block and one transformer block, compiled in several ways: microseconds of a call."""
    dtype, device = settings.dtype, settings.device
    large = device == "cuda"
    channels, side = (640, settings.size[0] // 16) if large else (32, 8)
    samples = 2 * settings.batch

    def resnet(options: dict, dynamic: bool) -> float:
        block = ResnetBlock2D(in_channels=channels, temb_channels=4 * channels, groups=32)
        block = block.to(device, dtype, memory_format=torch.channels_last).eval()
        x = torch.randn(samples, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        time = torch.randn(samples, 4 * channels, device=device, dtype=dtype)
        return _compiled(block, (x, time), options, dynamic, settings)

    def transformer(fp8: bool) -> float:
        block = BasicTransformerBlock(channels, max(1, channels // 64), 64, cross_attention_dim=2048 if large else 32)
        block = block.to(device, dtype).eval()
        if fp8:
            quantize_(block, torchao_config("fp8-dynamic"))
        x = torch.randn(samples, side * side, channels, device=device, dtype=dtype)
        context = torch.randn(samples, 77, 2048 if large else 32, device=device, dtype=dtype)
        return _compiled(block, (x, None, context), inductor_options(device, "regional", True), True, settings)

    plain = {"conv_1x1_as_mm": True, "epilogue_fusion": False} if large else {}
    layout = {**plain, "force_layout_optimization": True} if large else {}
    ours = inductor_options(device, "regional", True)
    if not large:
        return {"ResNet, dynamic": lambda: resnet(plain, True)}
    return {
        "ResNet, dynamic": lambda: resnet(plain, True),
        "ResNet, dynamic, layout option": lambda: resnet(layout, True),
        "ResNet, dynamic, layout option, own GroupNorm": lambda: resnet(ours, True),
        "ResNet, static": lambda: resnet(plain, False),
        "transformer, bfloat16": lambda: transformer(False),
        "transformer, fp8": lambda: transformer(True),
    }


def _compiled(block, inputs: tuple, options: dict, dynamic: bool, settings: Settings) -> float:
    torch._dynamo.reset()
    function = torch.compile(block.forward, fullgraph=True, dynamic=dynamic, options=options or None)
    with torch.no_grad():
        return _microseconds(lambda: function(*inputs), settings)


def _microseconds(function: Callable[[], object], settings: Settings) -> float:
    def several() -> None:
        for _ in range(_CALLS):
            function()

    with torch.no_grad():
        several()
        seconds = [timed(several, settings.device)[0] for _ in range(_ROUNDS)]
    return round(min(seconds) / _CALLS * 1e6, 2)


def kernels(function: Callable[[], object], settings: Settings) -> list[dict]:
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
