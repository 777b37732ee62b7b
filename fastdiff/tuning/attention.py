"""Attention as questions: one for each distinct size, whose options are kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .question import Option, Question

PYTORCH = "PyTorch"
# |difference| / |result| that rounding makes in 16 bits, twice over.
_ROUNDING = 0.02
# Times as large as ordinary ones are, of large inputs, scores and values.
_LARGE = 30


class AttentionSize(NamedTuple):
    """What a layer attends over: `kind` is "self" or "cross"; in cross-attention the last tokens are masked."""

    kind: str
    heads: int
    head_dim: int
    queries: int
    keys: int
    masked: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        """The size in words."""
        tokens = f"{self.queries} by {self.keys} tokens"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}-attention, {self.heads} heads of {self.head_dim}, {tokens}, {dtype}"


def attention_question(
    size: AttentionSize,
    kernels: Mapping[str, Callable],
    device: torch.device,
    batch: int = 2,
    lossy: Collection[str] = (),
) -> Question:
    """Whether a kernel takes the place of PyTorch's.

    Args:
        size: of the model's own pictures.
        kernels: by name, functions of query, key, value and mask.
        device: where they run.
        batch: samples.
        lossy: names of kernels that round more than PyTorch's.
    """
    functions = {PYTORCH: F.scaled_dot_product_attention, **kernels}
    options = tuple(
        Option(name, functools.partial(functions.__getitem__, name), name not in lossy) for name in functions
    )

    def inputs(kind: str, share: float) -> tuple[torch.Tensor | None, ...]:
        generator = torch.Generator().manual_seed(0)
        rows = 1 if kind == "one row" else max(2, round(size.queries * share))

        def draw(tokens: int, large: float) -> torch.Tensor:
            # Heads behind tokens, as projections leave them.
            x = torch.randn(batch, tokens, size.heads, size.head_dim, generator=generator)
            x = {"zeros": 0.0, "large": large}.get(kind, 1.0) * x
            return x.to(device, size.dtype).transpose(1, 2)

        query, key, value = draw(rows, _LARGE**0.5), draw(size.keys, _LARGE**0.5), draw(size.keys, _LARGE)
        if kind == "zero rows":
            query[:, :, : rows // 2] = 0
        mask = None
        if size.masked:
            mask = torch.zeros(1, 1, 1, size.keys, dtype=size.dtype, device=device)
            mask[..., size.keys - size.masked :] = -torch.inf
        return query, key, value, mask

    return Question(size.key, options, inputs, _ROUNDING)
