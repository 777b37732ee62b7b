"""CUDA's default plan on a machine without CUDA: fake tensors on a fake GPU through every step of it.

What is real: the plan, its choices for a Hopper GPU, torchao's quantization, tracing of all regions with the options of
CUDA, the pass that puts in our GroupNorm, the graphs' bookkeeping. What is not: numbers, generated code, recordings.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from support.embedded import draw, load_stock
from support.fake_cuda import CUDA, FakeCuda, why_no_fake_cuda
from support.tape_recorder import RunningRecorder
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException

import fastdiff.attention_choice
import fastdiff.plan
from fastdiff import FastConfig, FastStableDiffusionXLPipeline, OptimizationWarning
from fastdiff.compiler import artifact_key
from fastdiff.compiler.norms import ChannelsLastNorms
from fastdiff.models.attention_backends import backends
from fastdiff.tuning import Outcome

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Traced:
    """In place of inductor: keeps each region's options, and its graph after the pass that goes before."""

    def __init__(self):
        self.regions: list[tuple[str, dict, torch.fx.Graph]] = []
        self._compile = torch.compile

    def __call__(self, function, options=None, **kwargs):
        def backend(module, inputs):
            own = (options or {}).get("pre_grad_custom_pass")
            if own is not None:
                own(module.graph)
                module.recompile()
            self.regions.append((function.__name__, options, module.graph))
            return module

        return self._compile(function, backend=backend, **kwargs)

    def calls(self) -> list[str]:
        return [str(node.target) for _, _, graph in self.regions for node in graph.nodes if node.op == "call_function"]


@pytest.fixture
def hopper(monkeypatch):
    if (why := why_no_fake_cuda()) is not None:
        pytest.skip(why)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("torchao.quantization.quant_api.is_sm_at_least_89", lambda: True)
    monkeypatch.setattr(fastdiff.plan, "why_no_kernels", lambda device, dtype: None)
    monkeypatch.setattr("fastdiff.compiler.compilation._MIN_PARAMETERS", 0)
    # There is nothing here to measure.
    monkeypatch.setattr(fastdiff.attention_choice, "measure_attention", lambda *_: {})
    recorders = []

    def recorder(device) -> RunningRecorder:
        recorders.append(RunningRecorder(device))
        return recorders[-1]

    monkeypatch.setattr(fastdiff.plan, "CudaRecorder", recorder)
    traced = Traced()
    monkeypatch.setattr(torch, "compile", traced)
    with FakeCuda(), warnings.catch_warnings():
        warnings.simplefilter("error", OptimizationWarning)
        yield traced, recorders


def pipeline(dtype: torch.dtype = torch.bfloat16, fast: FastConfig | None = None, **vae) -> Any:
    """A pipeline on the GPU whose UNet has layers that are large enough for float8."""
    stock = load_stock()
    config = {**stock.unet.config, "_name_or_path": "", "block_out_channels": (64, 512), "layers_per_block": 1,
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 3),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 8)}  # fmt: skip
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    stock.vae.register_to_config(**vae)
    models = {**stock.components, "unet": unet}
    pipe = FastStableDiffusionXLPipeline(**models, fast=fast).to(dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_default_plan_and_pictures_on_a_hopper_gpu(hopper):
    traced, recorders = hopper
    pipe = pipeline()
    steps = {step.name: step for step in pipe.plan}
    on = {name for name, step in steps.items() if step.applied}
    assert on == {"convert", "host schedule", "channels_last", "fuse_qkv", "context_cache", "quantize", "compile",
                  "cuda_graphs"}, pipe.explain()  # fmt: skip
    assert steps["quantize"].reason.startswith("fp8-dynamic")
    for call in ({}, {"negative_prompt": "a green star"}, {"prompt": "another"}, {"height": 96}):
        picture = draw(pipe, output_type="pt", **call)
        assert picture.shape == (1, 3, call.get("height", 64), 64) and picture.device == CUDA
    (recorder,) = recorders
    # Two sizes of the UNet and of the VAE; three prompts share a graph. The first call of a graph is no replay.
    assert recorder.recorded == 4 and recorder.replayed == 4 * (3 + 1) - 4
    assert not any(name.startswith("coordinate_descent") for _, options, _ in traced.regions for name in options)
    assert all(options["force_layout_optimization"] for _, options, _ in traced.regions)
    assert all(isinstance(options["pre_grad_custom_pass"], ChannelsLastNorms) for _, options, _ in traced.regions)
    calls = traced.calls()
    assert calls.count("fastdiff.channels_last_group_norm.default") > 10
    assert not any("function group_norm" in call for call in calls)

    regions = len(traced.regions)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    draw(pipe, output_type="pt")
    assert "DDIM" in pipe.explain() and "on   quantize" in pipe.explain()
    assert recorders == [recorder] and recorder.recorded == 4 and len(traced.regions) == regions, "nothing is made anew"
    other = torch.device("cuda", 0), "regional", pipe.plan
    assert artifact_key(pipe.unet, pipe.vae, *other)["device"] == "cuda, NVIDIA H100 9.0"


def test_attention_by_the_kernel_that_won(hopper, monkeypatch):
    traced, recorders = hopper
    monkeypatch.setattr(fastdiff.attention_choice, "MIN_PARAMETERS", 0)
    measured = []

    def measure(model, sizes, *_):
        measured.extend(sizes)
        outcomes = {name: Outcome(1.0, (1.2, 1.2, 1.2)) for name in backends()}
        return {size.key: {"PyTorch": Outcome(), **outcomes} for size in sizes if size.kind == "self"}

    monkeypatch.setattr(fastdiff.attention_choice, "measure_attention", measure)
    pipe = pipeline()
    for _ in range(2):
        draw(pipe, output_type="pt")
    (step,) = (step for step in pipe.plan if step.name == "attention")
    assert step.applied and step.reason == "self-attention by cuDNN, measured here 1.2 to 1.2 times PyTorch's choice"
    assert {size.kind for size in measured} == {"self", "cross"} and {size.head_dim for size in measured} == {64}
    assert [recorder.recorded for recorder in recorders] == [2] and recorders[0].replayed == 2 * (3 + 1) - 2
    assert any("_sdpa_kernel" in call for call in traced.calls()), "within the regions"


def test_float16_on_a_hopper_gpu(hopper):
    _, recorders = hopper
    explained = pipeline(torch.float16).explain()
    assert "off  quantize" in explained and "weights are torch.float16; quantization needs bfloat16" in explained
    # Uncompiled, as what is compiled cannot be cast while its tensors are fake.
    pipe = pipeline(torch.float16, FastConfig(compile="off"), force_upcast=True)
    steps = {step.name: step for step in pipe.plan}
    assert steps["cuda_graphs"].applied and "not the VAE, which force_upcast casts" in steps["cuda_graphs"].reason
    for _ in range(2):
        assert draw(pipe, output_type="pt").shape == (1, 3, 64, 64)
        assert pipe.vae.dtype == torch.float16
    # The UNet's steps alone, and nothing is made anew although the VAE is cast to and fro.
    assert [(each.recorded, each.replayed) for each in recorders] == [(0, 0), (1, 5)]


def test_loop_never_looks_at_the_device(hopper):
    """Any number that the host wants of the device is an error on fake tensors; a timestep on the device is one."""
    pipe = pipeline(fast=FastConfig.preset("exact", compile="off"))
    draw(pipe, output_type="pt")
    with pytest.raises(DataDependentOutputException):
        torch.ones(1, device=CUDA).item()


def test_pass_takes_silu_in_only_where_nothing_else_reads_it():
    def both(x, weight):
        normal = F.group_norm(x, 8, weight)
        return F.silu(normal), normal

    def alone(x, weight):
        return F.silu(F.group_norm(x, 8, weight, eps=1e-3)) + 1

    x = torch.randn(2, 64, 6, 5).to(memory_format=torch.channels_last)
    weight, graphs = torch.randn(64), []
    for function in (both, alone):

        def backend(module, inputs):
            with torch.no_grad():
                ChannelsLastNorms()(module.graph)
            module.recompile()
            graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
            return module

        with torch.no_grad():
            result = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)(x, weight)
            torch.testing.assert_close(result, function(x, weight))
        graphs.append(None)
    assert "fastdiff.channels_last_group_norm.default" in graphs[0] and any("silu" in call for call in graphs[0])
    assert "fastdiff.channels_last_group_norm.default" in graphs[2] and not any("silu" in call for call in graphs[2])


def test_code_made_with_our_pass_is_kept(tmp_path, monkeypatch):
    """What the pass puts in is known to the caches of the compiler, which the next process and `save_compiled` use."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(2, 64, 6, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            function = torch.compile(lambda x: F.silu(F.group_norm(x, 8)) + 1, dynamic=True,
                                     options={"pre_grad_custom_pass": ChannelsLastNorms()})  # fmt: skip
            torch.testing.assert_close(function(x), F.silu(F.group_norm(x, 8)) + 1)
    counts = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit", "bypass")}
    assert counts == {"miss": 1, "hit": 1, "bypass": 0}


def test_pictures_in_nchw_keep_the_ordinary_norm():
    graphs = []

    def backend(module, inputs):
        with torch.no_grad():
            ChannelsLastNorms()(module.graph)
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    with torch.no_grad():
        torch.compile(lambda x: F.group_norm(x, 8), backend=backend, dynamic=True)(torch.randn(2, 64, 6, 5))
    assert graphs and "fastdiff.channels_last_group_norm.default" not in graphs[0]
