"""Never worse than stock: with each of these faults the picture is drawn, as stock draws it, and told of once."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import warnings

import pytest
import torch
from support.embedded import draw, load_fast, load_stock
from support.loras import write_lora
from support.tape_recorder import TapeRecorder

import fastdiff.plan
import fastdiff.weight_steps
from fastdiff import FastConfig, OptimizationWarning
from fastdiff.failures import _HOMES, _OFF, Failures
from fastdiff.graphs.wiring import Wiring
from fastdiff.models.attention import FastAttention
from fastdiff.models.attention_backends import Backend
from fastdiff.models.context import ContextCache
from fastdiff.schedulers.twins import FastEulerDiscreteScheduler

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class BrokenRecorder(TapeRecorder):
    """A recorder that fails in one of its methods."""

    def __init__(self, method: str, error: Exception):
        super().__init__()
        self.method, self.error = method, error

    def _fail(self, method: str) -> None:
        if method == self.method:
            raise self.error

    def warm_up(self, function):
        self._fail("warm_up")
        return super().warm_up(function)

    def record(self, function):
        self._fail("record")
        recording = super().record(function)

        def replay() -> None:
            self._fail("replay")
            recording.replay()

        return dataclasses.replace(recording, replay=replay)


def raising(error: Exception, module: str = "torch.injected"):
    """A function that raises, as if it were in a module: torch's, unless told."""
    there = {"__name__": module, "error": error}
    exec("def fail(*args, **kwargs):\n    raise error.with_traceback(None)", there)
    return there["fail"]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")
MISSING = NotImplementedError("Could not run 'mkldnn::_linear_pointwise' with arguments from this backend")


def no_cxx_compiler(patch):
    error = torch._inductor.exc.InvalidCxxCompiler()
    patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", raising(error))


def no_triton(patch):
    # Code that is in a cache needs no Triton any more.
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    patch.setattr("torch._inductor.graph.GraphLowering.compile_to_module", raising(
        RuntimeError("Cannot find a working triton installation")))


def backend_raises(patch):
    patch.setattr("torch._inductor.compile_fx.compile_fx", raising(RuntimeError("the backend has a defect")))


def unwritable_cache(patch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/cache/torchinductor")

    patch.setattr("torch._inductor.codecache.write_atomic", fail)
    patch.setattr("torch._inductor.codecache.write", fail)


def graphs(method: str, error: Exception):
    def break_(patch):
        patch.setattr(fastdiff.plan, "CudaRecorder", lambda device: BrokenRecorder(method, error))
        patch.setattr(fastdiff.plan, "why_no_graphs", lambda requested, device: None if requested else "off")

    return break_


def no_stream(patch):
    patch.setattr(fastdiff.plan, "CudaRecorder", raising(RuntimeError("CUDA error: no stream")))
    patch.setattr(fastdiff.plan, "why_no_graphs", lambda requested, device: None if requested else "off")


def wiring(patch):
    graphs("", OUT_OF_MEMORY)(patch)
    patch.setattr(Wiring, "settings", raising(AttributeError("a module of another version")))


def no_such_kernel(patch):
    choice = fastdiff.attention_choice.AttentionChoice({"self": Backend("cuDNN", alone=True)}, "a test")
    patch.setattr(fastdiff.plan, "choose_attention", lambda *_: choice)


def quantize_raises(patch):
    patch.setattr("fastdiff.weight_steps.choose_quantization", lambda requested, *_, **__: (
        fastdiff.weights.schemes.QuantizationChoice(None if requested == "none" else "int8-weight-only", "a test")))
    patch.setattr("fastdiff.weight_steps.apply_quantization", raising(ImportError("torchao: undefined symbol")))


def attribute(target, name: str, error: Exception):
    return lambda patch: patch.setattr(target, name, raising(error))


COMPILED = {"compile": "regional"}
# By the shipped table: measuring would find out, and not take the form.
PACKED = {"pack_weights": True, "tuning": "off"}
FAULTS = {
    "no C++ compiler": ("compile", no_cxx_compiler, COMPILED),
    "no Triton": ("compile", no_triton, COMPILED),
    "a backend that raises": ("compile", backend_raises, COMPILED),
    "a whole graph that does not compile": ("compile", backend_raises, {"compile": "full"}),
    "an unwritable cache": ("compile", unwritable_cache, COMPILED),
    "regions that cannot be made": (
        "compile", attribute(fastdiff.plan, "apply_compilation", RuntimeError("no such option")), COMPILED),
    "out of memory while capturing": ("cuda_graphs", graphs("record", OUT_OF_MEMORY), {}),
    "out of memory for a graph's buffers": ("cuda_graphs", graphs("warm_up", OUT_OF_MEMORY), {}),
    "a wait while capturing": ("cuda_graphs", graphs("record", RuntimeError("stream is capturing")), {}),
    "a replay that fails": ("cuda_graphs", graphs("replay", RuntimeError("CUDA error: invalid argument")), {}),
    "no stream": ("cuda_graphs", no_stream, {}),
    "modules that graphs do not know": ("cuda_graphs", wiring, {}),
    "torchao failing": ("quantize", quantize_raises, {"quantization": "auto"}),
    "an operator that is missing": (
        "pack_weights", lambda patch: patch.setattr("fastdiff.weights.packed._linear", raising(MISSING)), PACKED),
    "packing failing": ("pack_weights", attribute(fastdiff.weight_steps, "apply_packing", MISSING), PACKED),
    "a kernel for attention that cannot be chosen": (
        "attention", attribute(fastdiff.plan, "choose_attention", MISSING), {}),
    "a kernel for attention that the device lacks": ("attention", no_such_kernel, {}),
    "out of memory while fusing": ("fuse_qkv", attribute(FastAttention, "fuse", OUT_OF_MEMORY), {}),
    "out of memory for another memory format": (
        "channels_last", attribute(fastdiff.plan, "apply_channels_last", OUT_OF_MEMORY), {}),
    "keys and values that cannot be kept": ("context_cache", attribute(ContextCache, "_fill", OUT_OF_MEMORY), {}),
    "a schedule that fails": (
        "host schedule", lambda patch: patch.setattr(
            FastEulerDiscreteScheduler, "step", raising(AttributeError("sigmas_"), "fastdiff.schedulers.host")), {}),
    "no guidance interval": (
        "guidance_interval", attribute(fastdiff.plan, "apply_guidance_interval", AttributeError("_hooks")),
        {"guidance_interval": (0.1, 0.9)}),
    "no deep cache": (
        "deep_cache", attribute(fastdiff.plan, "apply_deep_cache", AttributeError("down_blocks")),
        {"deep_cache_interval": 2}),
}  # fmt: skip


def make(fields: dict, **more):
    return load_fast(FastConfig.preset("exact", **fields, **more))


@pytest.mark.parametrize("fault", FAULTS)
def test_picture_is_drawn_and_the_plan_says_why(fault, monkeypatch, stock, assert_close):
    step, break_, fields = FAULTS[fault]
    break_(monkeypatch)
    pipe = make(fields)
    with pytest.warns(OptimizationWarning) as told:
        pictures = [draw(pipe, seed=seed, output_type="pt") for seed in (0, 1)]
    for seed, picture in enumerate(pictures):
        assert_close(picture, draw(stock, seed=seed, output_type="pt"))
    told = [str(warning.message) for warning in told if isinstance(warning.message, OptimizationWarning)]
    assert len(told) == 1 and f"without {step}, which failed" in told[0], told
    (kept,) = [each for each in pipe.plan if each.name == step]
    assert not kept.applied and "failed and was taken off" in kept.reason
    assert f"off  {step}" in pipe.explain() and pipe.fast_config.strict is False


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_raises_the_error(fault, monkeypatch):
    _, break_, fields = FAULTS[fault]
    break_(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizationWarning)
        with pytest.raises((RuntimeError, AttributeError, ImportError, PermissionError)):
            pipe = make(fields, strict=True)
            for seed in (0, 1):
                draw(pipe, seed=seed, output_type="pt")


def test_every_step_of_the_plan_can_be_taken_off():
    plan = {step.name for step in load_fast("exact").plan} - {"convert"}
    assert plan <= set(_OFF)
    for homes in _HOMES.values():
        for home in homes:
            importlib.import_module(home)
    failures = Failures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizationWarning)
        for step in _OFF:
            failures.note(step, OUT_OF_MEMORY)
    assert failures.without(FastConfig(guidance_interval=(0.1, 0.9))) == FastConfig.preset("off", dtype="auto")


def test_a_callers_mistake_takes_nothing_off():
    pipe = load_fast("exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizationWarning)
        for call in ({"prompt_embeds": torch.zeros(1, 77, 7), "pooled_prompt_embeds": torch.zeros(1, 128),
                      "prompt": None, "guidance_scale": 1.0},
                     {"latents": torch.zeros(1, 3, 8, 8)}):  # fmt: skip
            with pytest.raises(RuntimeError):
                draw(pipe, **call)
    assert pipe._failures.steps == ()
    assert all("failed" not in step.reason for step in pipe.plan)


def test_errors_of_a_callback_are_the_callers():
    pipe, calls = load_fast("exact"), []

    def callback(*args):
        calls.append(1)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        draw(pipe, callback_on_step_end=callback)
    assert len(calls) == 1


def test_what_fails_later_is_not_drawn_again(monkeypatch):
    pipe = load_fast("exact")
    draw(pipe)
    monkeypatch.setattr(ContextCache, "_fill", raising(OUT_OF_MEMORY))
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, seed=1)


def test_answers_are_not_hidden():
    pipe = load_fast(FastConfig.preset("exact", quantization="fp8-dynamic"))
    with pytest.raises(ValueError, match="8.9"):
        draw(pipe)


def test_lora_after_a_failure(monkeypatch, tmp_path, assert_close):
    graphs("record", OUT_OF_MEMORY)(monkeypatch)
    file = write_lora(load_stock(), tmp_path, seed=1)
    pipe, stock = load_fast("exact"), load_stock()
    with pytest.warns(OptimizationWarning):
        draw(pipe)
    for each in (pipe, stock):
        each.load_lora_weights(file)
    assert_close(draw(pipe), draw(stock))
