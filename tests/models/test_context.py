"""The context cache: computed once per prompt, and never stale."""

from __future__ import annotations

import gc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.embedded import draw, load_fast, load_stock
from support.fake_cuda import FakeCuda, why_no_fake_cuda
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import FastConfig, FastUNet2DConditionModel


def unet_inputs(unet, batch: int = 2, tokens: int = 77, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(
            batch, tokens, unet.config.cross_attention_dim, generator=generator
        ),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, width, generator=generator),
            "time_ids": torch.zeros(batch, 6),
        },
    }


@pytest.fixture
def pair() -> tuple[FastUNet2DConditionModel, torch.nn.Module]:
    """A fast UNet and a stock one with weights of its own."""
    return FastUNet2DConditionModel.from_stock(load_stock().unet), load_stock().unet


@pytest.fixture
def check(pair, assert_close):
    fast, stock = pair

    def compare(inputs: dict) -> torch.Tensor:
        with torch.no_grad():
            expected = stock(**inputs).sample
            assert_close(fast(**inputs)[0], expected)
        return expected

    return compare


def test_keys_and_values_once_per_layer_and_prompt(exact):
    counts: Counter[str] = Counter()
    hooks = []
    for name, module in exact.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_q")):
            hooks.append(module.register_forward_hook(lambda *_, name=name: counts.update([name])))
    draw(exact, num_inference_steps=30)
    for hook in hooks:
        hook.remove()
    projections = {name: n for name, n in counts.items() if not name.endswith("to_q")}
    assert len(projections) == 2 * len(exact.unet.context_cache.layers)
    assert set(projections.values()) == {1}
    assert {n for name, n in counts.items() if name.endswith("to_q")} == {30}


def test_flops_per_step_are_stocks_less_the_hoisted_part(pair):
    fast, stock = pair
    inputs = unet_inputs(stock)
    context = inputs["encoder_hidden_states"]
    with torch.no_grad():
        fast(**inputs)
        measured = {}
        for name, unet in (("fast", fast), ("stock", stock)):
            with FlopCounterMode(display=False) as counter:
                unet(**inputs)
            measured[name] = counter.get_total_flops()
    hoisted = sum(
        2 * context.shape[0] * context.shape[1] * projection.weight.numel()
        for attn in fast.context_cache.layers
        for projection in (attn.to_k, attn.to_v)
    )
    assert hoisted > 0
    assert measured["fast"] == measured["stock"] - hoisted


def test_new_tensor_edit_in_place_and_other_shapes(pair, check):
    inputs = unet_inputs(pair[1])
    first = check(inputs)
    inputs["encoder_hidden_states"].mul_(1.5)
    assert (check(inputs) - first).abs().max() > 1e-4
    inputs["encoder_hidden_states"][1, 3:40] = 0
    check(inputs)
    inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
    check(inputs)
    for batch, tokens in ((1, 77), (2, 154), (4, 77), (2, 77)):
        check(unet_inputs(pair[1], batch, tokens, seed=batch + tokens))


def test_changed_weights_are_seen(pair, check):
    fast, stock = pair
    inputs = unet_inputs(stock)
    check(inputs)
    for unet in pair:
        with torch.no_grad():
            for module in unet.modules():
                if getattr(module, "is_cross_attention", False):
                    module.to_v.weight.mul_(1.1)
    check(inputs)
    state = {key: value * 0.9 for key, value in stock.state_dict().items()}
    for unet in pair:
        unet.load_state_dict(state)
    check(inputs)


def test_storage_keeps_its_addresses(pair):
    fast, stock = pair

    def addresses(seed: int) -> list[int]:
        inputs = unet_inputs(stock, seed=seed)
        with torch.no_grad():
            fast(**inputs)
            held = fast.context_cache.project(inputs["encoder_hidden_states"])
        return [tensor.data_ptr() for kv in held for tensor in kv]

    first = addresses(0)
    gc.collect()
    assert addresses(1) == first


def test_two_contexts_alive_do_not_share_storage(pair, check):
    cache = pair[0].context_cache
    inputs = [unet_inputs(pair[1], seed=seed) for seed in range(cache.MAX_ENTRIES + 2)]
    check(inputs[0])
    one_entry = cache.nbytes
    for _ in range(2):
        for one in inputs:
            check(one)
    assert cache.nbytes == cache.MAX_ENTRIES * one_entry > 0
    del inputs, one
    gc.collect()
    check(unet_inputs(pair[1], seed=0))
    gc.collect()
    check(unet_inputs(pair[1], seed=1, batch=1))
    assert cache.nbytes < (cache.MAX_IDLE + 1) * one_entry
    pair[0].to(torch.float32)
    assert cache.nbytes == 0


def test_inference_mode_is_right_though_nothing_is_cached(pair, assert_close):
    fast, stock = pair
    with torch.inference_mode():
        inputs = unet_inputs(stock)
        for factor in (1.0, 1.7):
            inputs["encoder_hidden_states"].mul_(factor)
            assert_close(fast(**inputs)[0], stock(**inputs).sample)
    assert fast.context_cache.nbytes == 0


def test_gradients_reach_context_and_weights(pair, assert_close):
    gradients = []
    for unet in pair:
        inputs = unet_inputs(unet)
        context = inputs["encoder_hidden_states"].requires_grad_()
        unet.requires_grad_(True)
        unet(**inputs)[0].square().sum().backward()
        weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        gradients.append((context.grad, weight.grad))
    for fast, stock in zip(*gradients, strict=True):
        assert stock.abs().max() > 0
        assert_close(fast / stock.abs().max(), stock / stock.abs().max())


def test_autocast(pair, assert_close):
    fast, stock = pair
    inputs = unet_inputs(stock)
    with torch.no_grad():
        fast(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(fast(**inputs)[0].float(), stock(**inputs).sample.float(), tolerance=0.1)
        assert_close(fast(**inputs)[0], stock(**inputs).sample)


@pytest.mark.parametrize("edit", ["replace", "in_place", "guidance_off"])
def test_callbacks_that_change_the_prompt_mid_run(edit, stock, exact, assert_close):
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def change(pipe, step, timestep, tensors):
        if step != 1:
            return {}
        if edit == "replace":
            return {"prompt_embeds": tensors["prompt_embeds"].roll(1, dims=-1)}
        if edit == "in_place":
            tensors["prompt_embeds"].mul_(0.5)
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensors[name].chunk(2)[-1] for name in names}

    call = {
        "num_inference_steps": 5, "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names,
    }
    expected = draw(stock, **call)
    assert (expected - draw(stock, num_inference_steps=5)).abs().max() > 1e-3
    assert_close(draw(exact, **call), expected)


def test_edit_between_calls_that_no_tensor_records(exact, stock, assert_close):
    prompt = {"prompt": None}
    prompt |= dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
            stock.encode_prompt("a blue star", device="cpu", do_classifier_free_guidance=False),
            strict=True,
        )
    )
    prompt["guidance_scale"] = 1.0
    assert_close(draw(exact, **prompt), draw(stock, **prompt))
    prompt["prompt_embeds"].data.mul_(0.3)
    assert_close(draw(exact, **prompt), draw(stock, **prompt))


def test_free_caches_and_switch():
    fast = load_fast()
    draw(fast)
    assert "caches hold 0.0" not in fast.explain()
    fast.free_caches()
    assert "caches hold 0.0" in fast.explain()
    fast = load_fast(FastConfig.preset("exact", context_cache=False))
    draw(fast)
    assert fast.unet.context_cache.nbytes == 0


@pytest.mark.parametrize("cached_first", [True, False])
def test_a_context_that_is_cast_otherwise_is_projected_anew(pair, cached_first):
    fast, inputs = pair[0], unet_inputs(pair[1])
    with torch.no_grad():
        if cached_first:
            fast(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            result = fast(**inputs)[0]
        fast.free_caches()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(result, fast(**inputs)[0])


def test_each_stream_has_keys_and_values_of_its_own(exact, monkeypatch):
    """Threads may have a stream each, and share a context: what one of them is still writing, no other may read."""
    if (why := why_no_fake_cuda()) is not None:
        pytest.skip(why)
    streams = [SimpleNamespace(cuda_stream=1), SimpleNamespace(cuda_stream=2)]
    current = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    with FakeCuda():
        unet = FastUNet2DConditionModel.from_config(exact.unet.config).to("cuda")
        cache, context = unet.context_cache, torch.ones(2, 77, unet.config.cross_attention_dim, device="cuda")
        seen = []
        with torch.no_grad():
            for stream in (*streams, *streams):
                current.append(stream)
                seen.append(cache.project(context)[0].key)
    assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]
