"""diffusers' `set_attention_backend` on our UNet: on stock's SDXL it does nothing, and says nothing."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from support.embedded import draw, load_fast, load_stock
from support.loras import write_lora
from support.tape_recorder import TapeRecorder

from fastdiff.graphs import GraphPool, apply_graphs
from fastdiff.models import ContextKV


@pytest.fixture
def dispatched(monkeypatch):
    """The backends that attention was sent to."""
    seen, before = [], _AttentionBackendRegistry._active_backend
    original = attention_dispatch.dispatch_attention_fn

    def dispatch(*args, backend=None, **kwargs):
        seen.append(backend.value)
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setattr("fastdiff.models.processor.dispatch_attention_fn", dispatch)
    yield seen
    _AttentionBackendRegistry.set_active_backend(before)


def attentions(unet) -> int:
    return sum(name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules())


def test_backend_computes_every_attention_and_equals_stock(dispatched, stock, assert_close):
    pipe = load_fast("exact")
    draw(pipe, num_inference_steps=1)
    assert not dispatched, "PyTorch chooses by default"
    pipe.unet.set_attention_backend("_native_math")
    assert_close(draw(pipe), draw(stock))
    assert dispatched == ["_native_math"] * 3 * attentions(pipe.unet)
    pipe.unet.reset_attention_backend()
    dispatched.clear()
    draw(pipe)
    assert not dispatched


def test_backend_with_separate_projections(dispatched, tmp_path, assert_close):
    file = write_lora(load_stock(), tmp_path, seed=1)
    pipe, stock = load_fast("exact"), load_stock()
    for each in (pipe, stock):
        each.load_lora_weights(file)
    pipe.unet.set_attention_backend("_native_math")
    pipe.unet.context_cache.enabled = False
    assert_close(draw(pipe, num_inference_steps=1), draw(stock, num_inference_steps=1))
    assert len(dispatched) == attentions(pipe.unet)


def test_a_graph_for_each_backend(dispatched):
    unet, recorder = load_fast("exact").unet, TapeRecorder()
    apply_graphs([unet], GraphPool(recorder), ContextKV)
    config = unet.config
    call = {
        "sample": torch.ones(2, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.ones(2, 77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.ones(2, 128), "time_ids": torch.full((2, 6), 64.0)},
    }
    with torch.no_grad():
        results = [unet(**call)[0] for _ in range(2)]
        unet.set_attention_backend("_native_math")
        results += [unet(**call)[0] for _ in range(2)]
    assert recorder.recorded == 2 and recorder.replayed == 2
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        load_fast("exact").unet.set_attention_backend("fastest")
