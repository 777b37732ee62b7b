"""Prompts and negative prompts through the text encoders in one batch: half the launches, one read of the weights."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

# What upstream computes nothing for, or something that is not the same for both.
_GIVEN = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "clip_skip",
)


def encode_together(encode_prompt: Callable, zero_for_none: bool, args: tuple, kwargs: dict) -> tuple | None:
    """Call upstream's `encode_prompt` once for the prompts and the negative ones, as if all of them were prompts.

    Args:
        encode_prompt: bound method of the stock pipeline.
        zero_for_none: the pipeline's `force_zeros_for_empty_prompt`.
        args, kwargs: of the call.

    Returns:
        What `encode_prompt` returns, or None for a call that is not one of two equal batches of texts; upstream then
        knows what to do, or which error to raise.
    """
    call = signature(encode_prompt).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if not given["do_classifier_free_guidance"] or any(given[name] is not None for name in _GIVEN):
        return None
    if given["negative_prompt"] is None and zero_for_none:
        return None
    negative = given["negative_prompt"] or ""
    texts = [given["prompt"], given["prompt_2"] or given["prompt"], negative, given["negative_prompt_2"] or negative]
    count = 1 if isinstance(texts[0], str) else len(texts[0] or ())
    lists = [one for i, text in enumerate(texts) if (one := _as_list(text, count, repeat=i > 1)) is not None]
    if not count or len(lists) < len(texts):
        return None
    prompt, prompt_2, negative, negative_2 = lists
    changed = {
        "prompt": prompt + negative,
        "prompt_2": prompt_2 + negative_2,
        "negative_prompt": None,
        "negative_prompt_2": None,
        "do_classifier_free_guidance": False,
    }
    embeds, _, pooled, _ = encode_prompt(**{**given, **changed})
    return *_halves(embeds), *_halves(pooled)


def _as_list(text: Any, count: int, repeat: bool) -> list[str] | None:
    """A list of `count` texts, or None; upstream repeats a single negative text for all prompts."""
    if isinstance(text, str):
        return [text] * count if repeat or count == 1 else None
    is_list = isinstance(text, list) and len(text) == count and all(isinstance(part, str) for part in text)
    return text if is_list else None


def _halves(joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Copies: upstream's are tensors of their own, which callers may edit in place.
    first, second = joined.chunk(2)
    return first.clone(), second.clone()
