"""The plan: which optimisations a pipeline gets, in which order, and why.

This is the only file that knows the order:

    convert          stock classes become fast ones, over the same weights; everything below needs them
    host schedule    a scheduler whose steps never wait for the device
    memory format    before fusing and compiling, so that graphs see the final strides
    fuse             before quantizing, so that the fused weight is what gets quantized
    context cache    reads the projections as they are in the end; holds no weights
    quantize         before compiling, so that the graph contains the quantized kernels
    compile          last on the weights' side: what changes afterwards would recompile
    capture          around everything, over compiled code
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import apply_fusion
from .compilation import apply_compilation, choose_compile, undo_compilation
from .config import FastConfig
from .quantization import apply_quantization, choose_quantization
from .schedulers import fast_scheduler
from .unet import FastUNet2DConditionModel
from .vae import FastAutoencoderKL


@dataclass(frozen=True)
class PlanStep:
    """One step of the plan.

    Attributes:
        name: what is done.
        applied: whether it is done on this machine with this configuration.
        reason: why, or why not.
        lossless: whether results equal stock's within rounding.
    """

    name: str
    applied: bool
    reason: str
    lossless: bool = True


_OFF = "switched off by FastConfig.{}"


def convert_component(name: str, component, config: FastConfig):
    """Return the fast twin of a pipeline component, over the same weights, or the component itself.

    Args:
        name: the component's name in the pipeline (`"unet"`, `"vae"`, `"scheduler"`, ...).
    """
    if config.is_off or component is None:
        return component
    if name == "unet":
        return FastUNet2DConditionModel.from_stock(component)
    if name == "vae" and type(component) in (FastAutoencoderKL, *FastAutoencoderKL.__bases__):
        return FastAutoencoderKL.from_stock(component)
    if name == "scheduler" and config.host_schedule:
        return fast_scheduler(component)
    return component


class Plan:
    """The ordered steps for one pipeline: decided once for its device, applied once, then only read."""

    def __init__(self, config: FastConfig, unet, vae, scheduler):
        self.config, self.unet, self.vae, self.scheduler = config, unet, vae, scheduler

    def apply(self) -> list[PlanStep]:
        """Apply every step that is not yet in place, in order; returns all steps."""
        if self.config.is_off:
            return [PlanStep("convert", False, 'preset "off": the stock classes stay in place')]
        return [
            PlanStep("convert", True, "UNet and VAE share the stock weights"),
            self._host_schedule(),
            self._channels_last(),
            self._fuse(),
            self._context_cache(),
            self._quantize(),
            self._compile(),
            self._capture(),
        ]

    def _host_schedule(self) -> PlanStep:
        name = "host schedule"
        if not self.config.host_schedule:
            return PlanStep(name, False, _OFF.format("host_schedule"))
        if fast_scheduler(self.scheduler) is not self.scheduler or not _is_fast(self.scheduler):
            return PlanStep(name, False, f"no fast class for {type(self.scheduler).__name__}")
        return PlanStep(name, True, f"{type(self.scheduler).__name__} keeps its schedule on the CPU")

    def _channels_last(self) -> PlanStep:
        wanted = self.config.channels_last
        for model in (self.unet, self.vae):
            model.to(memory_format=torch.channels_last if wanted else torch.contiguous_format)
        return PlanStep("channels_last", wanted, "convolutions" if wanted else _OFF.format("channels_last"))

    def _fuse(self) -> PlanStep:
        name = "fuse_qkv"
        if not self.config.fuse_qkv:
            for model in (self.unet, self.vae):
                apply_fusion(model, False)
            return PlanStep(name, False, _OFF.format(name))
        self.unet.fuse_qkv_projections()
        fused, left = apply_fusion(self.unet, True)
        if isinstance(self.vae, FastAutoencoderKL):
            self.vae.fuse_qkv_projections()
            in_vae, left_in_vae = apply_fusion(self.vae, True)
            fused, left = fused + in_vae, {**left, **left_in_vae}
        reason = f"{fused} self-attention layers" if fused else "no self-attention layer"
        for why, count in left.items():
            reason += f"; {count} separate: {why}"
        return PlanStep(name, fused > 0, reason)

    def _context_cache(self) -> PlanStep:
        cache = self.unet.context_cache
        cache.enabled = self.config.context_cache
        if not cache.enabled:
            cache.clear()
            return PlanStep("context_cache", False, _OFF.format("context_cache"))
        return PlanStep("context_cache", True, f"keys and values of {len(cache.layers)} layers once per prompt")

    def _quantize(self) -> PlanStep:
        name = "quantize"
        done = getattr(self.unet, "quantized_scheme", None)
        choice = choose_quantization(self.config.quantization, self.unet.device, self.unet.dtype)
        if done is None and choice.scheme is not None:
            taken, left = apply_quantization(self.unet, choice.scheme)
            self.unet.quantized_scheme = (choice.scheme, f"{taken} linear layers, {left} left; {choice.reason}")
            done = self.unet.quantized_scheme
        if done is None:
            return PlanStep(name, False, choice.reason, lossless=False)
        return PlanStep(name, True, f"{done[0]}: {done[1]}", lossless=False)

    def _compile(self) -> PlanStep:
        choice = choose_compile(self.config.compile, self.unet, self.unet.device)
        done = getattr(self.unet, "compiled_mode", ("off", 0))
        if choice.mode != done[0]:
            undo_compilation(self.unet, self.vae)
            regions = 0 if choice.mode == "off" else apply_compilation(self.unet, self.vae, choice.mode)
            self.unet.compiled_mode = done = (choice.mode, regions)
        if choice.mode == "off":
            return PlanStep("compile", False, choice.reason)
        return PlanStep("compile", True, f"{choice.mode}, {done[1]} regions: {choice.reason}")

    def _capture(self) -> PlanStep:
        if self.config.cuda_graphs is False:
            return PlanStep("cuda_graphs", False, _OFF.format("cuda_graphs"))
        return PlanStep("cuda_graphs", False, f"not available on {self.unet.device.type} in this version")


def _is_fast(scheduler) -> bool:
    return type(scheduler).__qualname__.startswith("Fast")


def format_plan(steps: list[PlanStep], header: str) -> str:
    """Render steps as a table: mark, name, lossless or lossy, reason."""
    width = max(len(step.name) for step in steps)
    rows = [header]
    for step in steps:
        kind = "lossless" if step.lossless else "lossy"
        rows.append(f"  {'on ' if step.applied else 'off'}  {step.name:<{width}}  {kind:<8}  {step.reason}")
    return "\n".join(rows)
