"""One of the three projections whose weights a fused one holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .form import Form, Kind


class FusedPart(Form, nn.Linear):
    """Stands where `to_q`, `to_k` or `to_v` is, without a weight, so that an adapter finds what it is to wrap.

    The product is that of `to_qkv`, in whatever form; an adapter's part is added beside it. Whoever asks for the weight
    has the projections taken apart, and gets it.
    """

    _plain = nn.Linear
    _extras = ("attention", "index")
    # The `FastAttention` that it is part of.
    attention: Any
    index: int

    @classmethod
    def of(cls, attention: Any, index: int) -> FusedPart:
        """Make the part of a fused attention, the first, second or third."""
        part: Any = nn.Linear(1, 1, bias=False, device="meta")
        part.__class__ = cls
        part._parameters = {"bias": None}
        # Not as a submodule, which it contains.
        part.__dict__.update(attention=attention, index=index, source=None)
        part.in_features, part.out_features = attention.to_qkv.in_features, attention.to_qkv.out_features // 3
        return part.train(attention.training)

    @property
    def kind(self) -> Kind:  # type: ignore[override]  # follows the fused projection's
        """What the plain weight looks like."""
        whole = self.attention.to_qkv
        weight = whole.kind if isinstance(whole, Form) else whole.weight
        shape = torch.Size((self.out_features, self.in_features))
        return Kind(shape, weight.dtype, weight.device, weight.requires_grad)

    def held(self) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def can_give_up(self) -> bool:
        """Whether the projections can be taken apart."""
        whole = self.attention.to_qkv
        return not isinstance(whole, Form) or whole.can_give_up()

    def give_up(self) -> None:
        """Take the projections apart."""
        self.attention.unfuse()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`: somebody wants this part alone."""
        return self._as_plain(input)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self.give_up()
        nn.Module.__setattr__(self, name, value)

    def _plain_weight(self) -> torch.Tensor:
        whole = self.attention.to_qkv
        weight = whole._plain_weight() if isinstance(whole, Form) else whole.weight.detach()
        return weight.chunk(3)[self.index]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (bias := self.attention.to_qkv.bias) is not None:
            destination[prefix + "bias"] = bias.detach().chunk(3)[self.index]

    def _apply(self, fn, recurse: bool = True):
        return self

    def __getstate__(self) -> dict:
        return self.__dict__.copy()

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
