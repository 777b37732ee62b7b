"""Prompts and negative prompts in one batch: stock's embeddings, stock's errors, half the calls of the encoders."""

from __future__ import annotations

import pytest
import torch
from support.embedded import draw, load_fast

ONE, OTHER = "a red circle on a blue background", "a small green star"

TOGETHER = {
    "one": {"prompt": ONE, "negative_prompt": OTHER},
    "lists": {"prompt": [ONE, OTHER], "negative_prompt": [OTHER, ""]},
    "one negative for all": {"prompt": [ONE, OTHER, ONE], "negative_prompt": "blurry"},
    "second prompts": {"prompt": ONE, "prompt_2": OTHER, "negative_prompt": "x", "negative_prompt_2": "blurry"},
    "second prompts of lists": {"prompt": [ONE, OTHER], "prompt_2": [OTHER, ONE], "negative_prompt": ["", ONE]},
    "several pictures": {"prompt": [ONE, OTHER], "negative_prompt": "blurry", "num_images_per_prompt": 3},
    "empty negative": {"prompt": ONE, "negative_prompt": ""},
    "long": {"prompt": "word " * 100, "negative_prompt": "other " * 200},
}
ALONE = {
    "no negative": {"prompt": ONE},
    "no guidance": {"prompt": ONE, "negative_prompt": OTHER, "do_classifier_free_guidance": False},
    "clip_skip": {"prompt": ONE, "negative_prompt": OTHER, "clip_skip": 1},
}


@pytest.fixture(scope="module")
def fast():
    return load_fast("exact")


def encode(pipe, call: dict) -> tuple[tuple, int]:
    """What `encode_prompt` gives, and how often each text encoder ran."""
    runs = []
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    hooks = [encoder.register_forward_hook(lambda *_: runs.append(1)) for encoder in encoders]
    try:
        with torch.no_grad():
            return pipe.encode_prompt(**call), len(runs) // 2
    finally:
        for hook in hooks:
            hook.remove()


def check_equal(found: tuple, expected: tuple) -> None:
    for mine, stocks in zip(found, expected, strict=True):
        assert (mine is None) == (stocks is None)
        if mine is not None:
            assert mine.shape == stocks.shape
            torch.testing.assert_close(mine, stocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", TOGETHER)
def test_both_in_one_batch(stock, fast, case):
    expected, stock_runs = encode(stock, TOGETHER[case])
    found, runs = encode(fast, TOGETHER[case])
    check_equal(found, expected)
    assert (stock_runs, runs) == (2, 1)
    assert all(part.is_contiguous() for part in found)


@pytest.mark.parametrize("case", ALONE)
def test_all_else_as_upstream(stock, fast, case):
    expected, stock_runs = encode(stock, ALONE[case])
    found, runs = encode(fast, ALONE[case])
    check_equal(found, expected)
    assert runs == stock_runs


def test_given_embeddings_are_left_alone(stock, fast):
    (embeds, _, pooled, _), _ = encode(stock, {"prompt": ONE})
    call = {"prompt": None, "prompt_2": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    call["negative_prompt"] = OTHER
    expected, _ = encode(stock, call)
    found, runs = encode(fast, call)
    check_equal(found, expected)
    assert runs == 1


@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_zeros_or_the_empty_text(stock, zeros):
    fast = load_fast("exact")
    for pipe in (stock, fast):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    try:
        expected, _ = encode(stock, {"prompt": ONE})
        found, runs = encode(fast, {"prompt": ONE})
        check_equal(found, expected)
        assert runs == 1 and bool(found[1].any()) is not zeros
    finally:
        stock.register_to_config(force_zeros_for_empty_prompt=True)


@pytest.mark.parametrize(
    "call",
    [
        {"prompt": [ONE, OTHER], "negative_prompt": ["x", "y", "z"]},
        {"prompt": [ONE, OTHER], "prompt_2": OTHER, "negative_prompt": "x"},
        {"prompt": [ONE, OTHER], "negative_prompt": ("x", "y")},
    ],
)
def test_errors_are_upstreams(stock, fast, call):
    raised = []
    for pipe in (stock, fast):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            encode(pipe, call)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


def test_preset_off_encodes_as_stock():
    _, runs = encode(load_fast("off"), TOGETHER["one"])
    assert runs == 2


def test_the_picture_is_stocks(stock, fast, assert_close):
    call = {"negative_prompt": OTHER, "guidance_scale": 4.0}
    assert_close(draw(fast, **call), draw(stock, **call))
