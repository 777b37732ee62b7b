"""Attention on GPUs by one of PyTorch's kernels, in place of the one that it takes by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """`F.scaled_dot_product_attention` without dropout, by a kernel of PyTorch's.

    Equal ones are the same to code that was compiled or captured with them, also in another process.

    Attributes:
        name: one of `backends()`.
        alone: raise where the kernel does not take what it is given; if not, PyTorch's next one does.
    """

    name: str
    alone: bool = False

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend. `query`, `key`, `value`: (batch, heads, tokens, head_dim); `mask` is added to the scores."""
        first = _BACKENDS[self.name]
        others = [] if self.alone else [each for each in (*_BACKENDS.values(), SDPBackend.MATH) if each != first]
        with sdpa_kernel([first, *others], set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def backends() -> dict[str, Callable]:
    """The kernels to choose from, by name, each alone."""
    return {name: Backend(name, alone=True) for name in _BACKENDS}
