"""The plan: which optimisations a pipeline gets, in which order, and why.

This is the only file that knows the order:

    convert          stock classes become fast ones, over the same weights; everything below needs them
    host schedule    a scheduler whose steps never wait for the device
    memory format    before fusing and compiling, so that graphs see the final strides
    fuse             before quantizing, so that the fused weight is what gets quantized
    context cache    reads the projections as they are in the end; holds no weights
    attention        before compiling, as code depends on it; where a kernel was measured to win on this machine
    quantize         before compiling, so that the graph contains the quantized kernels; on CPUs where it was measured
                     to win on this machine
    pack             what is not quantized, where that wins; not what is going to be compiled
    compile          last on the weights' side: what changes afterwards would recompile
    lossy options    hooks around the models and around whole blocks, which must wrap compiled code
    capture          around everything, over compiled code
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .attention_choice import AttentionChoice, choose_attention
from .choices import FormChoices
from .compiler import apply_compilation, choose_compile, compiled_by_user, expect_new_graphs, undo_compilation
from .config import FastConfig
from .failures import Failures
from .graphs import GraphPool, apply_graphs, remove_graphs, why_no_graphs
from .graphs.recording import CudaRecorder
from .heap import return_freed_memory
from .lossy.deep_cache import apply_deep_cache, remove_deep_cache
from .lossy.guidance_interval import apply_guidance_interval
from .models.attention import FastAttention
from .models.attention_kernel import apply_attention
from .models.base import FastModelMixin, casts_layerwise, prepare_compiled, unwrapped
from .models.context import ContextKV
from .models.group_norm import why_no_kernels
from .models.memory_format import apply_channels_last
from .models.offload import clear_left_forwards, inner_offloading
from .models.unet import FastUNet2DConditionModel
from .models.vae import FastAutoencoderKL
from .schedulers import fast_scheduler
from .steps import PlanStep
from .weight_steps import WeightSteps
from .weights import (
    apply_packing,
    remove_quantization,
)

_OFF = "switched off by FastConfig.{}"
_ONE_GRAPH = "you compiled the UNet, whose graph is the same in each step"


class Plan(WeightSteps):
    """The ordered steps for one pipeline: decided once for its device, applied once, then only read.

    Args:
        device: where the models run, which with offloading is not where they are.
        controlnets: fast ControlNets, treated as the UNet is.
        failures: the steps that failed before, which are left out.
        bar: arguments of progress bars.
    """

    def __init__(self, config: FastConfig, unet, vae, scheduler, controlnets=(), device=None, failures=None, bar=None):
        self.failures = failures or Failures(config.strict)
        self._config, self.unet, self.vae, self.scheduler = config, unwrapped(unet), unwrapped(vae), scheduler
        self.controlnets, self.device = [unwrapped(net) for net in controlnets], device or unet.device
        self.denoisers, self.bar = [self.unet, *self.controlnets], bar or {}
        self.forms: dict[object, FormChoices] = {}
        components = (unet, *controlnets, vae)
        self.by_user = {id(unwrapped(c)): how for c in components if (how := compiled_by_user(c)) is not None}
        for component in components:
            prepare_compiled(component)

    @property
    def config(self) -> FastConfig:
        """What is asked for, without what has failed."""
        return self.failures.without(self._config)

    def apply(self) -> list[PlanStep]:
        """Apply every step that is not yet in place, in order; returns all steps."""
        if self.config.is_off:
            return [PlanStep("convert", False, 'preset "off": the stock classes stay in place')]
        if not isinstance(self.unet, FastUNet2DConditionModel):
            return [PlanStep("convert", False, f"left: a {type(self.unet).__qualname__}"), self._host_schedule()]
        remove_graphs((*self.denoisers, self.vae))
        for model in (*self.denoisers, self.vae):
            clear_left_forwards(model)
        # Its hooks wrap what compiling replaces. Another pipeline over the same UNet may want them back.
        self.had_deep_cache = remove_deep_cache(self.unet)
        names = "UNet, ControlNet and VAE" if self.controlnets else "UNet and VAE"
        return [
            PlanStep("convert", True, f"{names} share the stock weights"),
            self._attempt("host schedule", self._host_schedule),
            *self._weights(),
            self._attempt("context_cache", self._context_cache),
            self._attempt("attention", self._attention),
            self._attempt_anew("quantize", self._quantize),
            self._attempt_anew("pack_weights", self._pack),
            self._attempt("compile", self._compile),
            self._attempt("guidance_interval", self._guidance_interval),
            self._attempt("deep_cache", self._deep_cache),
            self._attempt("cuda_graphs", self._capture),
        ]

    def apply_schedule(self, steps: list[PlanStep]) -> list[PlanStep]:
        """The steps of an applied plan for another scheduler, which changes nothing of the models."""
        schedule = self._attempt("host schedule", self._host_schedule)
        return [schedule if step.name == schedule.name else step for step in steps]

    def _attempt(self, name: str, step: Callable[[], PlanStep]) -> PlanStep:
        """Apply a step; one that fails, now or in an earlier picture, is taken off, and the plan says why."""
        done, reason = self.failures.attempt(name, step) or PlanStep(name, False, ""), self.failures.get(name)
        return done if reason is None else replace(done, applied=False, reason=reason)

    def _attempt_anew(self, name: str, step: Callable[[], PlanStep]) -> PlanStep:
        """Apply a step that makes weights anew; the memory of the old ones is free for the next one's."""
        done = self._attempt(name, step)
        return_freed_memory()
        return done

    def prepare_offload(self, fused: bool) -> None:
        """Do what has to be done before single layers are moved in and out; takes off compiled code.

        Args:
            fused: whether projections may be fused. Sequential offload finds weights by their stock names.
        """
        if self.config.is_off or not isinstance(self.unet, FastUNet2DConditionModel):
            return
        remove_graphs((*self.denoisers, self.vae))
        remove_deep_cache(self.unet)
        for model in self._with_forms():
            remove_quantization(model)
            apply_packing(model, ())
        if inner_offloading(self.unet) is None:
            self._channels_last()
            self._fuse() if fused else self._unfuse()
        for model in (*self.denoisers, self.vae):
            undo_compilation(model)
            model.__dict__.pop("compiled_for", None)

    def _weights(self) -> list[PlanStep]:
        offloading = inner_offloading(self.unet)
        if offloading is None:
            return [
                self._attempt_anew("channels_last", self._channels_last),
                self._attempt_anew("fuse_qkv", self._fuse),
            ]
        layers = [m for model in self.denoisers for m in model.modules() if isinstance(m, FastAttention)]
        fused = sum(layer.is_fused for layer in layers)
        strides = self.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        return [
            PlanStep("channels_last", strides, f"as it was before {offloading}"),
            PlanStep("fuse_qkv", fused > 0, f"{fused} self-attention layers before {offloading}"),
        ]

    def _host_schedule(self) -> PlanStep:
        name = "host schedule"
        if not self.config.host_schedule:
            return PlanStep(name, False, _OFF.format("host_schedule"))
        if fast_scheduler(self.scheduler) is not self.scheduler or not _is_fast(self.scheduler):
            return PlanStep(name, False, f"no fast class for {type(self.scheduler).__name__}")
        return PlanStep(name, True, f"{type(self.scheduler).__name__} keeps its schedule on the CPU")

    def _channels_last(self) -> PlanStep:
        wanted, norms = self.config.channels_last, why_no_kernels(self.device, self.unet.dtype)
        for model in (*self.denoisers, self.vae):
            apply_channels_last(model, wanted, norms is None)
        reason = f"convolutions; GroupNorm: {norms or 'our kernels'}" if wanted else _OFF.format("channels_last")
        return PlanStep("channels_last", wanted, reason)

    def _fuse(self) -> PlanStep:
        name, fused, chosen = "fuse_qkv", 0, set()
        left: dict[str, int] = {}
        for model in self._projecting():
            wanted = self.config.fuse_qkv if model.fuse_choice is None else model.fuse_choice
            in_model, left_in_model = model.want_fusion(wanted)
            fused, left = fused + in_model, {**left, **left_in_model}
            chosen.add(model.fuse_choice)
        if not fused and not self.config.fuse_qkv:
            return PlanStep(name, False, _OFF.format(name))
        if not fused and False in chosen:
            return PlanStep(name, False, "separate by your call of unfuse_qkv_projections()")
        reason = f"{fused} self-attention layers" if fused else "no self-attention layer"
        for why, count in left.items():
            reason += f"; {count} separate: {why}"
        return PlanStep(name, fused > 0, reason)

    def _unfuse(self) -> None:
        for model in self._projecting():
            model.want_fusion(False)

    def _projecting(self) -> list:
        return [*self.denoisers, *([self.vae] if isinstance(self.vae, FastAutoencoderKL) else [])]

    def _context_cache(self) -> PlanStep:
        for model in self.denoisers:
            model.context_cache.enabled = self.config.context_cache
            if not self.config.context_cache:
                model.context_cache.clear()
        if not self.config.context_cache:
            return PlanStep("context_cache", False, _OFF.format("context_cache"))
        layers = sum(len(model.context_cache.layers) for model in self.denoisers)
        return PlanStep("context_cache", True, f"keys and values of {layers} layers once per prompt")

    def _attention(self) -> PlanStep:
        name, why = "attention", None
        if self.config.attention != "auto":
            why = _OFF.format(name)
        elif self.device.type == "cpu" and self._is_compiled():
            why = "left to PyTorch in compiled regions"
        elif any(model.device.type != self.device.type for model in self.denoisers):
            why = "left to PyTorch: the weights are elsewhere now"
        lossy = self.config.quantization != "none"
        choices = [
            AttentionChoice({}, why) if why else choose_attention(model, self.config.tuning, lossy, self.bar)
            for model in self.denoisers
        ]
        layers = sum(apply_attention(model, c.kernels) for model, c in zip(self.denoisers, choices, strict=True))
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices))
        return PlanStep(name, layers > 0, reasons, all(choice.lossless for choice in choices))

    def _compile(self) -> PlanStep:
        choice = choose_compile(self.config.compile, self.unet, self.device)
        offloading = inner_offloading(self.unet)
        if choice.mode != "off" and offloading is not None:
            return PlanStep("compile", False, f"{offloading} moves weights inside of the regions")
        norms = why_no_kernels(self.device, self.unet.dtype) is None
        for model in (*self.denoisers, self.vae):
            wanted = ("off" if self._is_left_alone(model) else choice.mode, self.device.type)
            if getattr(model, "compiled_for", ("off", self.device.type)) != wanted:
                undo_compilation(model)
                model.compiled_for = wanted
                model.compiled_regions = 0 if wanted[0] == "off" else apply_compilation(model, *wanted, norms)
            expect_new_graphs(model)
        yours = "".join(f"; compiled by you, and left so: {how}" for how in self.by_user.values())
        regions = sum(getattr(model, "compiled_regions", 0) for model in (*self.denoisers, self.vae))
        if not regions:
            return PlanStep("compile", False, yours.removeprefix("; ") or choice.reason)
        return PlanStep("compile", True, f"{choice.mode}, {regions} regions: {choice.reason}{yours}")

    def _is_left_alone(self, model) -> bool:
        """Whether a model is compiled by the user, or of a class, or with hooks, that our regions do not know."""
        return id(model) in self.by_user or not isinstance(model, FastModelMixin) or casts_layerwise(model)

    def _guidance_interval(self) -> PlanStep:
        name, interval = "guidance_interval", self.config.guidance_interval
        if interval is None:
            return PlanStep(name, False, "opt-in: FastConfig.guidance_interval", lossless=False)
        if id(self.unet) in self.by_user:
            return PlanStep(name, False, _ONE_GRAPH, lossless=False)
        apply_guidance_interval(self.unet, self.controlnets)
        return PlanStep(name, True, "guidance from {:.0%} to {:.0%} of the steps".format(*interval), lossless=False)

    def _deep_cache(self) -> PlanStep:
        name, interval = "deep_cache", self.config.deep_cache_interval
        if interval is not None and id(self.unet) in self.by_user:
            return PlanStep(name, False, _ONE_GRAPH, lossless=False)
        remove_deep_cache(self.unet)
        blocks = apply_deep_cache(self.unet) if interval is not None or self.had_deep_cache else 0
        if interval is None:
            return PlanStep(name, False, "opt-in: FastConfig.deep_cache_interval", lossless=False)
        return PlanStep(name, True, f"{blocks} inner blocks of the UNet in every {interval}. step", lossless=False)

    def _capture(self) -> PlanStep:
        name, models = "cuda_graphs", [m for m in (*self.denoisers, self.vae) if id(m) not in self.by_user]
        offloading = inner_offloading(self.unet) or ("model offload" if hasattr(self.unet, "_hf_hook") else None)
        reason = why_no_graphs(self.config.cuda_graphs, self.device)
        if reason is None and offloading is not None:
            reason = f"{offloading} moves the weights that graphs refer to"
        if reason is None and self.config.deep_cache_interval is not None:
            reason = "with deep_cache steps differ"
        if reason is not None:
            return PlanStep(name, False, reason)
        if not models:
            return PlanStep(name, False, "compiled by you, with graphs of its own if you asked for them")
        left = ""
        if self.vae in models and self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            models.remove(self.vae)
            left = "; not the VAE, which force_upcast casts to float32 and back in each call: its weights move"
        count = apply_graphs(models, GraphPool(CudaRecorder(self.unet.device)), ContextKV)
        return PlanStep(name, True, f"{count} regions, one graph for each shape, recorded at its first call{left}")


def _is_fast(scheduler) -> bool:
    return type(scheduler).__qualname__.startswith("Fast")
