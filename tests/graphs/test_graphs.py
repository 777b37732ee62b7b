"""Recorded steps: always what the model itself would have given, whatever changes between two calls.

On CPU the recorder replays the kernels of the first call over the same memory, without any Python, as a CUDA graph
does; all else is what runs on CUDA.
"""

from __future__ import annotations

import copy
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from support.embedded import draw, load_fast, load_stock
from support.family_features import controlnet
from support.ip_adapters import image_embeds, make_ip_adapter
from support.loras import write_lora
from support.tape_recorder import TapeRecorder
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import fastdiff.plan
from fastdiff import FastConfig, FastStableDiffusionXLControlNetPipeline, OptimizationWarning
from fastdiff.graphs import GraphPool, apply_graphs, graph_pools, graphed_methods, remove_graphs, why_no_graphs
from fastdiff.graphs.recording import searching_kernels
from fastdiff.models.context import ContextKV

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def recorder() -> TapeRecorder:
    return TapeRecorder()


@pytest.fixture
def on_tape(monkeypatch, recorder):
    """Let plans record on the CPU."""
    monkeypatch.setattr(fastdiff.plan, "CudaRecorder", lambda device: recorder)

    def as_on_cuda(requested, device) -> str | None:
        return why_no_graphs(requested, device) if requested is False else None

    monkeypatch.setattr(fastdiff.plan, "why_no_graphs", as_on_cuda)


@pytest.fixture
def pipe(on_tape):
    return load_fast("exact")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return write_lora(load_stock(), tmp_path_factory.mktemp("lora"), seed=1)


def inputs(unet, batch: int = 2, size: int = 8, seed: int = 0, tokens: int = 77) -> dict:
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, config.in_channels, size, size, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(batch, tokens, config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, generator=generator),
            "time_ids": torch.full((batch, 6), 64.0),
        },
    }


@torch.no_grad()
def step(unet, call: dict, **more) -> torch.Tensor:
    return unet(**call, **more)[0]


def eager(model, call: dict, **more) -> torch.Tensor:
    """What the model gives with its graphs set aside."""
    (method,) = graphed_methods([model])
    del model.denoise
    try:
        return step(model, call, **more)
    finally:
        model.denoise = method


@pytest.fixture
def unet(recorder):
    unet = load_fast("exact").unet
    apply_graphs([unet], GraphPool(recorder), ContextKV)
    return unet


def check(unet, call: dict, **more) -> torch.Tensor:
    """The first call and two replays give what the model gives."""
    expected = eager(unet, call, **more)
    for _ in range(3):
        assert torch.equal(step(unet, call, **more), expected)
    return expected


# Pictures


def test_pictures_are_those_without_graphs(pipe, recorder):
    calls = [{}, {"prompt": "a green star", "seed": 1}, {"guidance_scale": 1.0}, {"height": 32}, {"output_type": "pt"}]
    calls += [{"prompt": ["a red circle", "a blue square"], "generator": None, "latents": torch.ones(2, 4, 8, 8)}]
    pictures = [draw(pipe, **call) for call in calls + calls]
    assert "on   cuda_graphs" in pipe.explain() and "5 CUDA graphs" in pipe.explain()
    assert recorder.recorded == 5  # four shapes of the UNet, one of the decoder
    # 3 steps a call, and two pictures; the first calls of a graph are no replays
    assert recorder.replayed == 3 * 2 * len(calls) - 4 + 1
    remove_graphs([pipe.unet, pipe.vae])
    for call, picture in zip(calls + calls, pictures, strict=True):
        assert torch.equal(draw(pipe, **call), picture)


def test_guidance_interval_has_a_graph_for_each_half(on_tape, recorder):
    config = FastConfig.preset("exact", guidance_interval=(0.3, 0.9))
    picture = draw(load_fast(config), num_inference_steps=4)
    assert recorder.recorded == 2 and recorder.replayed == 2
    plain = load_fast(FastConfig.preset("exact", guidance_interval=(0.3, 0.9), cuda_graphs=False))
    assert torch.equal(picture, draw(plain, num_inference_steps=4))


def test_controlnet_has_its_own_graph(on_tape, recorder):
    stock = load_stock()
    net = controlnet(stock.unet)
    call = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    pictures = {}
    for graphs in (True, False):
        pipe = FastStableDiffusionXLControlNetPipeline.from_pipe(
            stock, controlnet=net, fast=FastConfig.preset("exact", cuda_graphs=graphs)
        )
        pipe.set_progress_bar_config(disable=True)
        pictures[graphs] = [draw(pipe, **call, controlnet_conditioning_scale=scale) for scale in (1.0, 0.5)]
        if graphs:
            assert len(graphed_methods([pipe.controlnet])) == 1 and recorder.recorded == 2
            assert recorder.replayed == 2 * (2 + 3)
    assert all(map(torch.equal, pictures[True], pictures[False]))


def test_tiles_and_slices_of_the_decoder_share_graphs(pipe, recorder):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    decode = torch.no_grad()(lambda: pipe.vae.decode(latents)[0])
    expected = decode()
    pipe.explain()
    pipe.vae.enable_slicing()
    assert torch.equal(decode(), decode()) and recorder.recorded == 1 and recorder.replayed == 3
    torch.testing.assert_close(decode(), expected)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 64
    tiled = decode()
    remove_graphs([pipe.vae])
    assert torch.equal(decode(), tiled)


@pytest.mark.parametrize("cached", [True, False])
def test_threads_take_turns(on_tape, recorder, cached):
    pipe = load_fast(FastConfig.preset("exact", context_cache=cached))

    def one(seed: int) -> torch.Tensor:
        return draw(pipe, seed=seed, prompt=["a red circle", "a blue square", "a star"][seed % 3])

    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(one, range(12)))
    assert recorder.replayed > 12 and recorder.recorded == 1
    remove_graphs([pipe.unet])
    wrong = [seed for seed in range(12) if not torch.equal(one(seed), pictures[seed])]
    assert wrong == []


# What a call brings


def test_results_are_the_callers_own(unet):
    call = inputs(unet)
    first, other = step(unet, call), {**call, "sample": call["sample"] * 2}
    second, third = step(unet, call), step(unet, other)
    assert torch.equal(first, second) and not torch.equal(second, third)
    second.zero_()
    assert torch.equal(step(unet, call), first)


def test_each_kind_of_arguments_has_its_graph(unet, recorder):
    call = inputs(unet)
    channels_last = {**call, "sample": call["sample"].contiguous(memory_format=torch.channels_last)}
    kinds = [call, channels_last, inputs(unet, batch=1), inputs(unet, size=12), inputs(unet, tokens=154)]
    kinds.append({**call, "encoder_attention_mask": torch.ones(2, 77)})
    for kind in kinds:
        check(unet, kind)
    assert recorder.recorded == len(kinds) == len(graph_pools([unet])[0])


def test_contexts_in_turn_and_edited_in_place(unet, recorder):
    one, two = inputs(unet), inputs(unet, seed=1)
    for _ in range(2):
        check(unet, one)
        check(unet, two)
    one["encoder_hidden_states"].mul_(0.5)
    check(unet, one)
    del two
    check(unet, inputs(unet, seed=2))  # in the storage that the dead context has left
    unet.free_caches()
    check(unet, one)
    assert recorder.recorded == 1
    unet.context_cache.enabled = False
    check(unet, one)


def test_lists_that_the_model_empties(unet):
    call, outputs = inputs(unet), []

    def keep(module, args, output) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    # T2I-Adapters add to what the last attention of a block gives, or to a block without attention as a whole.
    places = [block.resnets[-1] if hasattr(block, "attentions") else block for block in unet.down_blocks]
    hooks = [place.register_forward_hook(keep) for place in places]
    eager(unet, call)
    for hook in hooks:
        hook.remove()
    residuals = [torch.ones_like(output) for output in outputs]
    expected = eager(unet, call, down_intrablock_additional_residuals=list(residuals))
    for _ in range(3):
        assert torch.equal(step(unet, call, down_intrablock_additional_residuals=list(residuals)), expected)


@pytest.mark.parametrize("mode", ["gradients", "autocast", "another device"])
def test_calls_that_are_not_recorded(unet, recorder, mode):
    call = inputs(unet)
    if mode == "gradients":
        call["sample"].requires_grad_()
        unet(**call)[0].sum().backward()
        assert call["sample"].grad.abs().sum() > 0
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(step(unet, call), step(unet, call))
    else:
        graph_pools([unet])[0].recorder.device = torch.device("cuda", 0)
        step(unet, call)
    assert recorder.recorded == 0


def test_inference_mode_and_back(unet, recorder):
    with torch.inference_mode():
        call = inputs(unet)
        inside = [unet(**call)[0] for _ in range(2)]
    call = {**inputs(unet)}
    outside = check(unet, call)
    assert recorder.recorded == 2  # nothing is cached in inference mode, so the context itself is an argument
    torch.testing.assert_close(inside, [outside, outside])


# What the model is set to


def test_lora_in_all_its_states(unet, lora):
    call = inputs(unet)
    seen = [check(unet, call)]
    unet.load_lora_adapter(lora, prefix="unet", adapter_name="one")
    seen.append(check(unet, call))
    seen.append(check(unet, call, cross_attention_kwargs={"scale": 0.5}))
    unet.set_adapters(["one"], [0.2])
    seen.append(check(unet, call))
    unet.disable_lora()
    torch.testing.assert_close(check(unet, call), seen[0])
    unet.enable_lora()
    layer = next(m for name, m in unet.named_modules() if name.endswith("lora_A.one"))
    with torch.no_grad():
        layer.weight.mul_(3)
    seen.append(check(unet, call))
    unet.fuse_lora(0.5)
    seen.append(check(unet, call))
    # As a pipeline's unfuse_lora() does: past the model, straight to the layers.
    for module in unet.modules():
        if hasattr(module, "unmerge"):
            module.unmerge()
    check(unet, call)
    unet.unload_lora()
    torch.testing.assert_close(check(unet, call), seen[0])
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(seen) for b in seen[:i])


def test_switching_between_scales_records_each_once(unet, lora, recorder):
    call = inputs(unet)
    unet.load_lora_adapter(lora, prefix="unet", adapter_name="one")
    for scale in (1.0, 0.5, 1.0, 0.5):
        unet.set_adapters(["one"], [scale])
        check(unet, call)
    assert recorder.recorded == 2


def test_lora_of_a_pipeline(pipe, recorder, lora, assert_close):
    stock = load_stock()
    for change in (
        lambda pipe: None,
        lambda pipe: pipe.load_lora_weights(lora, adapter_name="one"),
        lambda pipe: pipe.set_adapters(["one"], [0.3]),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ):
        for each in (pipe, stock):
            change(each)
        expected = draw(stock)
        for _ in range(2):
            assert_close(draw(pipe), expected)
    assert recorder.recorded >= 5


def test_freeu(unet):
    call = inputs(unet)
    plain = check(unet, call)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    assert not torch.equal(check(unet, call), plain)
    unet.disable_freeu()
    assert torch.equal(check(unet, call), plain)


def test_weights_changed_in_place_are_seen_and_moved_ones_recorded_anew(unet, recorder):
    call = inputs(unet)
    plain = check(unet, call)
    weight = unet.conv_out.weight
    with torch.no_grad():
        weight.mul_(2)
        changed = check(unet, call)
        assert not torch.equal(changed, plain) and recorder.recorded == 1
        weight.data = weight / 2
        assert torch.equal(check(unet, call), plain) and recorder.recorded == 2
        unet.conv_out.weight = torch.nn.Parameter(weight * 2, requires_grad=False)
        assert torch.equal(check(unet, call), changed) and recorder.recorded == 3
        unet.conv_act = torch.nn.ReLU()
        assert not torch.equal(check(unet, call), changed) and recorder.recorded == 4
    assert len(graph_pools([unet])[0]) == 1


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Float8WeightOnlyConfig])
def test_quantized_weights(recorder, config):
    unet = load_fast("exact").unet
    # The plan leaves layers as small as these alone.
    quantize_(unet, config(set_inductor_config=False), filter_fn=lambda module, name: name.endswith("ff.net.2"))
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight) is not torch.nn.Parameter
    apply_graphs([unet], GraphPool(recorder), ContextKV)
    call = inputs(unet)
    check(unet, call)
    check(unet, {**call, "sample": call["sample"] * 2})
    assert recorder.recorded == 1


def test_fusing_and_processors(unet, recorder):
    call = inputs(unet)
    fused = check(unet, call)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(check(unet, call), fused)
    unet.fuse_qkv_projections()
    assert torch.equal(check(unet, call), fused)
    unet.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(check(unet, call), fused)


def test_processor_with_a_state_is_not_recorded(unet, recorder):
    class Counting(AttnProcessor2_0):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __call__(self, *args, **kwargs):
            self.count += 1
            return super().__call__(*args, **kwargs)

    call, counting = inputs(unet), Counting()
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(counting)
    check(unet, call)
    assert counting.count == 4 and recorder.recorded == 0


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_others_run_each_time(unet, recorder, register):
    call, seen = inputs(unet), []
    check(unet, call)
    hook = getattr(unet.mid_block, register)(lambda *_: seen.append(1))
    for count in (1, 2):
        step(unet, call)
        assert len(seen) == count
    hook.remove()
    check(unet, call)
    assert len(seen) == 2 and recorder.recorded == 1


def test_ip_adapter_is_not_recorded(pipe, recorder, assert_close):
    stock = load_stock()
    for each in (pipe, stock):
        each.load_ip_adapter(make_ip_adapter(stock.unet), subfolder="", weight_name="", image_encoder_folder=None)
    for scale in (1.0, 0.2):
        for each in (pipe, stock):
            each.set_ip_adapter_scale(scale)
        expected = draw(stock, ip_adapter_image_embeds=image_embeds())
        assert_close(draw(pipe, ip_adapter_image_embeds=image_embeds()), expected)
    assert recorder.recorded == 0


def test_training_mode_is_not_recorded(unet, recorder):
    step(unet.train(), inputs(unet))
    assert recorder.recorded == 0


# Bounds, failures, freeing


def test_prompts_in_flight_share_a_graph(unet, recorder):
    prompts = [inputs(unet, seed=seed) for seed in range(7)]
    expected = [eager(unet, call) for call in prompts]
    for _ in range(3):
        assert all(torch.equal(step(unet, call), result) for call, result in zip(prompts, expected, strict=True))
    assert recorder.recorded == 1 and recorder.replayed == 20
    # Nor are their keys and values computed more than once.
    projections = []
    hook = unet.context_cache.layers[0].to_k.register_forward_hook(lambda *_: projections.append(1))
    for call in prompts:
        step(unet, call)
    hook.remove()
    assert not projections


def test_keys_are_copied_when_they_change_and_only_then(unet, monkeypatch):
    copies, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: copies.append(len(to)) or copy_(to, source))
    one, two = inputs(unet), inputs(unet, seed=1)
    for call, copied in ((one, 1), (one, 1), (two, 2), (two, 2), (one, 3), (one, 3)):
        step(unet, call)
        assert len(copies) == copied
    one["encoder_hidden_states"].mul_(0.5)
    step(unet, one)
    assert len(copies) == 4
    # Another size has a graph of its own, over the same keys and values.
    step(unet, {**one, "sample": torch.ones(2, 4, 12, 12)})
    assert len(copies) == 4 and len(graph_pools([unet])[0]) == 2


def test_what_is_in_use_in_turn_is_recorded_once(recorder):
    unet = load_fast("exact").unet
    pool = GraphPool(recorder, max_graphs=2, patience=20)
    apply_graphs([unet], pool, ContextKV)
    sizes = [inputs(unet, size=size) for size in (4, 8, 12)]
    for call in sizes * 5:
        check(unet, call)
    # Two graphs; the third one found no room.
    assert len(pool) == 2 and recorder.recorded <= 4
    for _ in range(30):
        step(unet, sizes[2])
    assert len(pool) == 2 or len(pool) == 1
    replayed = recorder.replayed
    check(unet, sizes[2])
    assert recorder.replayed == replayed + 3, "what has come into use for good gets its graph"


def test_two_models_that_do_not_fit_together_do_not_take_turns(recorder):
    """As UNet and VAE of a large batch: the one recorded first keeps its graph, and the other goes without."""
    unet, other = load_fast("exact").unet, load_fast("exact").unet
    pool = GraphPool(recorder)
    apply_graphs([unet, other], pool, ContextKV)
    call = inputs(unet)
    step(unet, call)
    recorder.max_bytes = int(pool.nbytes * 1.2)
    for _ in range(10):
        step(unet, call)
        step(other, call)
    assert recorder.recorded == 2 and len(pool) == 1 and recorder.replayed == 10


def test_memory_is_bounded(recorder):
    unet = load_fast("exact").unet
    pool = GraphPool(recorder, patience=5)
    apply_graphs([unet], pool, ContextKV)
    call, huge = inputs(unet), inputs(unet, size=24)
    step(unet, call)
    recorder.max_bytes = int(pool.nbytes * 1.2)
    for _ in range(20):
        check(unet, huge)
    # Beside the other, and then alone; then it is known that there is no room.
    assert recorder.recorded <= 5 and len(pool) == 0 and pool.nbytes == 0


def test_recordings_of_two_pipelines_take_turns():
    """CUDA can record one graph at a time in a process."""
    running, most = [], []

    class Slow(TapeRecorder):
        def record(self, function):
            running.append(1)
            most.append(len(running))
            time.sleep(0.05)
            try:
                return super().record(function)
            finally:
                running.pop()

    unets = [load_fast("exact").unet for _ in range(3)]
    calls = [inputs(unet) for unet in unets]
    for unet in unets:
        apply_graphs([unet], GraphPool(Slow()), ContextKV)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(step, unets, calls))
    assert len(most) == 3 and max(most) == 1


def test_failure_is_told_once_and_remembered():
    unet = load_fast("exact").unet
    recorder = TapeRecorder(fails=True)
    pool = GraphPool(recorder)
    apply_graphs([unet], pool, ContextKV)
    attempts = []
    record = recorder.record
    recorder.record = lambda function: attempts.append(1) or record(function)
    call, other = inputs(unet), inputs(unet, batch=1)
    with pytest.warns(OptimizationWarning, match="without cuda_graphs, which failed.*capturing"):
        first = step(unet, call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(step(unet, call), first) and torch.equal(eager(unet, call), first)
        step(unet, other)
        step(unet, other)
    assert len(attempts) == 1 and len(pool) == 0


def test_a_callers_mistake_is_the_callers(unet, recorder):
    call = inputs(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                step(unet, {**call, "sample": torch.ones(2, 3, 8, 8)})
    check(unet, call)
    assert recorder.recorded == 1


def test_freeing_and_moving(pipe, recorder):
    picture = draw(pipe, output_type="pt")
    (pool,) = graph_pools([pipe.unet, pipe.vae])
    assert len(pool) == 2 and pool.nbytes > 0
    pipe.free_caches()
    assert len(pool) == 0 and pool.nbytes == 0 and recorder.forgotten > 0
    assert torch.equal(draw(pipe, output_type="pt"), picture) and len(pool) == 2
    pipe.to("cpu")
    assert len(pool) == 0
    assert torch.equal(draw(pipe, output_type="pt"), picture) and recorder.recorded == 6


def test_a_copied_unet_has_graphs_of_its_own(unet, recorder):
    call = inputs(unet)
    expected = check(unet, call)
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        twin.conv_out.weight.mul_(2)
    assert not torch.equal(check(twin, call), expected)
    assert torch.equal(check(unet, call), expected) and recorder.recorded == 2
    graphed_methods([twin])[0].clear()
    assert len(graph_pools([unet])[0]) == 1


def test_compiled_code_is_put_back(recorder):
    unet = load_fast("exact").unet
    calls = []
    plain = unet.denoise
    unet.denoise = compiled = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    apply_graphs([unet], GraphPool(recorder), ContextKV)
    call = inputs(unet)
    assert torch.equal(step(unet, call), step(unet, call)) and len(calls) == 2
    remove_graphs([unet])
    assert unet.denoise is compiled
    step(unet, call)
    assert len(calls) == 3 and not graph_pools([unet])


# The plan


def capture(pipe) -> str:
    (step,) = [step for step in pipe.plan if step.name == "cuda_graphs"]
    assert step.lossless
    return ("on: " if step.applied else "off: ") + step.reason


def test_plan_says_why_not():
    assert capture(load_fast("exact")) == "off: there are none on cpu"
    assert capture(load_fast(FastConfig.preset("exact", cuda_graphs=True))) == "off: there are none on cpu"
    assert why_no_graphs(False, torch.device("cuda")) == "switched off by FastConfig.cuda_graphs"
    if not torch.cuda.is_available():
        assert why_no_graphs("auto", torch.device("cuda")) == "no CUDA device is available"


def test_plan_with_a_device(on_tape, recorder):
    assert capture(load_fast("exact")).startswith("on: 2 regions")
    assert capture(load_fast(FastConfig.preset("exact", cuda_graphs=False))).startswith("off: switched off")
    deep = load_fast(FastConfig.preset("exact", deep_cache_interval=2))
    assert capture(deep) == "off: with deep_cache steps differ"
    draw(deep)
    assert recorder.recorded == 0
    offloaded = load_fast("exact")
    offloaded.explain()
    offloaded.enable_sequential_cpu_offload(device="cpu")
    assert capture(offloaded) == "off: sequential offload moves the weights that graphs refer to"
    upcast = load_fast("exact")
    upcast.vae.to(torch.float16).register_to_config(force_upcast=True)
    assert capture(upcast).startswith("on: 1 regions") and "not the VAE, which force_upcast casts" in capture(upcast)


def test_pipeline_without_graphs_over_the_same_unet(pipe, recorder):
    picture = draw(pipe)
    other = type(pipe).from_pipe(pipe, fast=FastConfig.preset("exact", deep_cache_interval=2))
    other.set_progress_bar_config(disable=True)
    deep = draw(other, num_inference_steps=6)
    assert not graphed_methods([pipe.unet])
    assert torch.equal(draw(pipe), picture) and torch.equal(draw(other, num_inference_steps=6), deep)


def test_another_scheduler_records_nothing_anew(pipe, recorder, stock, assert_close):
    draw(pipe)
    recorded, graphs_before = recorder.recorded, graphed_methods([pipe.unet])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    other = load_stock(scheduler=DDIMScheduler.from_config(stock.scheduler.config))
    assert_close(draw(pipe), draw(other))
    assert recorder.recorded == recorded and graphed_methods([pipe.unet]) == graphs_before
    assert "DDIM" in next(step.reason for step in pipe.plan if step.name == "host schedule")


def test_cudnn_searches_while_warming_up_and_at_no_other_time():
    before = torch.backends.cudnn.benchmark
    with pytest.raises(ZeroDivisionError), searching_kernels():
        assert torch.backends.cudnn.benchmark is True
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.benchmark is before


# On a GPU


@needs_cuda
def test_cuda_graphs_give_the_pictures_of_plain_calls():
    pictures = {}
    for graphs in (True, False):
        pipe = load_fast(FastConfig.preset("exact", cuda_graphs=graphs)).to("cuda")
        pictures[graphs] = [
            draw(pipe, seed=seed, prompt=prompt, output_type="pt")
            for seed, prompt in enumerate(["a star", "a ring"] * 2)
        ]
        assert ("CUDA graphs" in pipe.explain()) is graphs
    for with_graphs, without in zip(pictures[True], pictures[False], strict=True):
        torch.testing.assert_close(with_graphs, without, atol=1e-4, rtol=0)


@needs_cuda
def test_cuda_recorder_survives_a_recording_that_fails():
    from fastdiff.graphs.recording import CudaRecorder

    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.sum().item())
    recording = recorder.record(lambda: x * 2)
    x.fill_(3)
    with recorder.exclusive():
        recording.replay()
    assert recording.outputs.tolist() == [6.0] * 4
