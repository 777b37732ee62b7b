"""Compiled regions: whole, shared between equal blocks, and kept while LoRAs are switched."""

from __future__ import annotations

import pytest
import torch
from conftest import draw, load_fast, load_stock
from loras import write_lora
from torch._dynamo.utils import counters

from fastdiff import FastConfig
from fastdiff.compilation import apply_compilation, repeated_blocks, undo_compilation

COMPILED = FastConfig.preset("exact", compile="regional")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_a_whole_call_has_no_graph_break_and_equals_stock(stock, assert_close):
    fast = load_fast(COMPILED)
    assert_close(draw(fast, output_type="pt"), draw(stock, output_type="pt"))
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs < len(repeated_blocks(fast.unet))
    draw(fast, seed=1, num_inference_steps=5, guidance_scale=3.0)
    assert counters["stats"]["unique_graphs"] == graphs
    assert "regional" in next(step.reason for step in fast.plan if step.name == "compile")


def test_full_graph_equals_stock(stock, assert_close):
    fast = load_fast(FastConfig.preset("exact", compile="full"))
    fast.vae._repeated_blocks = []
    assert_close(draw(fast), draw(stock))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_compiling_can_be_undone():
    fast = load_fast()
    blocks = repeated_blocks(fast.unet)
    kinds = {type(block).__name__ for block in blocks}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
    assert apply_compilation(fast.unet, "regional") == len(blocks)
    assert all("forward" in block.__dict__ for block in blocks)
    undo_compilation(fast.unet)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_small_models_are_not_compiled_by_default():
    step = next(step for step in load_fast(FastConfig.preset("exact")).plan if step.name == "compile")
    assert not step.applied and "M parameters" in step.reason


def test_switching_loras_of_one_rank_does_not_recompile(tmp_path, assert_close):
    files = [write_lora(load_stock(), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    expected = []
    for file in files:
        stock = load_stock()
        stock.load_lora_weights(file)
        expected.append(draw(stock))
    assert (expected[0] - expected[1]).abs().max() > 1e-2

    fast = load_fast(COMPILED)
    # The transformer blocks are what a LoRA reaches.
    fast.unet._repeated_blocks = ["BasicTransformerBlock"]
    fast.vae._repeated_blocks = []
    fast.enable_lora_hotswap(target_rank=4)
    fast.load_lora_weights(files[0], adapter_name="style")
    assert_close(draw(fast), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(1, 11):
            fast.load_lora_weights(files[turn % 2], adapter_name="style", hotswap=True)
            assert_close(draw(fast), expected[turn % 2])
