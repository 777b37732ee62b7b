"""Calls that come while the first one still compiles: they wait or run eagerly, and draw the right picture."""

from __future__ import annotations

import threading

import pytest
import torch
from support.embedded import draw, load_fast
from torch._dynamo.utils import counters

from fastdiff import FastConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# A compiler that waits for itself never ends; one on a busy machine may take minutes.
DEADLOCK_S = 600


def draw_at_once(calls: list[tuple]) -> list[torch.Tensor]:
    """Run `draw(pipe, **options)` for each pair in a thread of its own; the threads set out together."""
    results: list = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def work(number: int) -> None:
        pipe, options = calls[number]
        ready.wait()
        try:
            results[number] = draw(pipe, **options)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_S)
    assert not any(thread.is_alive() for thread in threads), "the calls wait for each other"
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


CALLS = [{"seed": 1}, {"seed": 2, "height": 96, "guidance_scale": 3.0, "prompt": "a green square"}]


def compiled_pipe():
    pipe = load_fast(FastConfig.preset("exact", compile="regional"))
    # One class of block, so that the test takes seconds; the others compile in the same way.
    pipe.unet._repeated_blocks, pipe.vae._repeated_blocks = ["BasicTransformerBlock"], []
    return pipe


def test_two_first_calls_of_one_pipeline(stock, assert_close):
    pipe = compiled_pipe()
    for drawn, call in zip(draw_at_once([(pipe, call) for call in CALLS]), CALLS, strict=True):
        assert_close(drawn, draw(stock, **call))
    assert counters["stats"]["unique_graphs"] > 0


def test_first_calls_of_two_pipelines(stock, assert_close):
    for drawn, call in zip(draw_at_once([(compiled_pipe(), call) for call in CALLS]), CALLS, strict=True):
        assert_close(drawn, draw(stock, **call))
    assert counters["stats"]["unique_graphs"] > 0
