"""`torch.compile` by the user, in all its forms: no graph breaks, no more graphs than stock, and the plan keeps off."""

from __future__ import annotations

import os

import pytest
import torch
from support.embedded import draw, load_fast, load_stock
from support.tiny import load_tiny, tiny_unet
from torch._dynamo.utils import counters

from fastdiff import FastConfig, FastStableDiffusionXLPipeline, FastUNet2DConditionModel


@pytest.fixture(autouse=True)
def traced_only(fresh_compiler):
    """Run graphs as they were traced, without generating code."""
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield


@pytest.fixture(scope="module")
def stock():
    return load_tiny()


def load_fast_tiny(config="exact") -> FastStableDiffusionXLPipeline:
    return load_fast(config, unet=tiny_unet())


def unet_inputs(unet, batch: int, size: int, tokens: int, timestep) -> dict:
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, tokens, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, width), "time_ids": torch.zeros(batch, 6)},
    }


# Twelve calls of different kinds: batch, size, tokens, timestep.
CALLS = [
    (2, 8, 77, torch.tensor(500.0)),
    (2, 8, 77, torch.tensor(400.0)),
    (2, 8, 77, torch.tensor(400)),
    (1, 8, 77, torch.tensor(400)),
    (4, 8, 77, torch.tensor(400)),
    (2, 16, 77, torch.tensor(400)),
    (2, 12, 77, torch.tensor(400)),
    (2, 8, 154, torch.tensor(400)),
    (3, 16, 231, torch.tensor(300)),
    (2, 8, 77, torch.tensor(300.0)),
    (1, 16, 154, torch.tensor(300)),
    (2, 8, 77, 300),
]


@pytest.mark.skipif("FASTDIFF_LONG" not in os.environ, reason="traces 24 whole UNets, minutes; FASTDIFF_LONG=1 runs it")
def test_a_compiled_unet_makes_no_more_graphs_than_stock(assert_close):
    """Stock passes the compiler's limit of graphs in some of these calls, and so may ours: the limit is lifted."""
    made = {}
    unets = {"stock": tiny_unet(), "fast": FastUNet2DConditionModel.from_stock(tiny_unet())}
    results = {}
    for name, unet in unets.items():
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(unet, fullgraph=True)
        torch.manual_seed(0)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            results[name] = [compiled(**unet_inputs(unet, *call), return_dict=False)[0] for call in CALLS]
        made[name] = counters["stats"]["unique_graphs"]
        assert not counters["graph_break"]
    print(f"graphs over {len(CALLS)} calls: {made}")
    assert 0 < made["fast"] <= made["stock"]
    for actual, expected in zip(results["fast"], results["stock"], strict=True):
        assert_close(actual, expected)


def test_compiled_blocks_make_no_more_graphs_than_stock(assert_close):
    made, pictures = {}, {}
    for name, pipe in (("stock", load_stock()), ("fast", load_fast("exact"))):
        torch.compiler.reset()
        counters.clear()
        pipe.unet.compile_repeated_blocks(fullgraph=True)
        pictures[name] = [draw(pipe, num_inference_steps=2), draw(pipe, num_inference_steps=1, height=96)]
        made[name] = counters["stats"]["unique_graphs"]
    assert 0 < made["fast"] <= made["stock"], made
    for actual, expected in zip(pictures["fast"], pictures["stock"], strict=True):
        assert_close(actual, expected)


FORMS = ["torch.compile", "compile()", "blocks", "blocks one by one", "dynamic", "transformers"]


@pytest.mark.parametrize(("form", "first_picture"), [(form, index % 2 == 0) for index, form in enumerate(FORMS)])
def test_forms(form, first_picture, stock, assert_close):
    pipe = load_fast_tiny()
    if first_picture:
        draw(pipe)
    if form == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    elif form == "dynamic":
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, dynamic=True)
    elif form == "compile()":
        pipe.unet.compile(fullgraph=True)
    elif form == "blocks":
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    else:
        kind = "BasicTransformerBlock" if form == "blocks one by one" else "Transformer2DModel"
        for module in list(pipe.unet.modules()):
            for name, child in list(module.named_children()):
                if any(cls.__name__ == kind for cls in type(child).__mro__):
                    setattr(module, name, torch.compile(child, fullgraph=True))
    projected = []
    attention = pipe.unet.context_cache.layers[0]
    attention.to_k.register_forward_hook(lambda *_: projected.append(1))
    assert_close(draw(pipe, num_inference_steps=4), draw(stock, num_inference_steps=4))
    if form != "transformers":
        assert len(projected) == 1, "keys and values are still computed once a prompt"
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert "compiled by you" in pipe.explain()
    made = counters["stats"]["unique_graphs"]
    assert_close(draw(pipe, num_inference_steps=2, seed=1), draw(stock, num_inference_steps=2, seed=1))
    assert counters["stats"]["unique_graphs"] == made
    if "blocks" in form or form == "dynamic":
        assert_close(draw(pipe, height=96), draw(stock, height=96))


def test_the_plan_compiles_nothing_on_top_and_takes_off_what_it_had(stock, assert_close):
    pipe = load_fast_tiny(FastConfig.preset("exact", compile="regional"))
    pipe._apply_plan()
    assert any("_compiled_method" in module.__dict__ for module in pipe.unet.modules())
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    assert_close(draw(pipe), draw(stock))
    assert not any("_compiled_method" in module.__dict__ for module in pipe.unet.modules())
    assert any("_compiled_method" in module.__dict__ for module in pipe.vae.modules())


def test_a_decoder_compiled_by_the_user(stock, assert_close):
    pipe = load_fast_tiny()
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    assert_close(draw(pipe, output_type="pt"), draw(stock, output_type="pt"))
    assert counters["stats"]["unique_graphs"] == 1 and "AutoencoderKL.decode" in pipe.explain()


def test_a_stock_unet_compiled_by_the_user_is_compiled_as_it_was(stock, assert_close):
    source = load_tiny()
    source.unet = torch.compile(source.unet, fullgraph=True, dynamic=False)
    pipe = FastStableDiffusionXLPipeline.from_pipe(source, fast="exact")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.unet._orig_mod, FastUNet2DConditionModel)
    assert_close(draw(pipe), draw(stock))
    assert counters["stats"]["unique_graphs"] == 1
