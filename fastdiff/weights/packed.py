"""Layers over packed weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.form import Form

# PyTorch's operators over packed weights are what its compiler emits for CPUs; they have no public eager name yet.
_linear = torch.ops.mkldnn._linear_pointwise
_convolution = torch.ops.mkldnn._convolution_pointwise
# Where oneDNN's description of a tensor comes to its layout, after shape, dtype and four bytes of anything.
_LAYOUT = 112


class Packed(Form):
    """A layer that holds its weight in oneDNN's layout, from which the plain one comes back without loss."""

    _packed_names: tuple[str, ...] = ("packed_weight",)

    @classmethod
    def _hold(cls, layer: Any, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = cls._pack_weight(layer, weight)
        return dict(zip(cls._packed_names, packed, strict=True))

    @staticmethod
    def _pack_weight(layer: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError

    def can_give_up(self) -> bool:
        """Always."""
        return True

    def _plain_weight(self) -> torch.Tensor:
        parts = [packed.detach().to_dense() for packed in self.held()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PackedLinear(Packed, nn.Linear):
    """`nn.Linear` over a packed weight."""

    _plain = nn.Linear

    @staticmethod
    def _pack_weight(layer: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`."""
        if not self._can_compute(input) or input.ndim < 2:
            return self._as_plain(input)
        return _linear(input, self.packed_weight, self.bias, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):
    """`nn.Conv2d` over a packed weight; returns channels_last."""

    _plain = nn.Conv2d
    _extras = ("fitting",)
    packed_weight: Any
    fitted_to: torch.Size

    @staticmethod
    def _pack_weight(layer: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        # What it was fitted to before the weight was asked for, or else pictures of 512 pixels.
        return [_pack(weight, _geometry(layer), layer.__dict__.get("fitted_to", (2, layer.in_channels, 64, 64)))]

    def _plain_weight(self) -> torch.Tensor:
        return super()._plain_weight().contiguous(memory_format=torch.channels_last)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Conv2d`."""
        if not self._can_compute(input) or input.ndim != 4:
            return self._as_plain(input)
        if input.shape not in self.__dict__.setdefault("fitting", set()):
            self._fit(input.shape)
        return _convolution(
            input, self.packed_weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def _fit(self, shape: torch.Size) -> None:
        """Pack anew for inputs of this shape, if oneDNN wants another layout for it, as it may on AVX2.

        Over the layout for other shapes it would lay out the weight in each call, which takes longer than the product.
        """
        geometry = _geometry(self)
        if _wanted_layout(self.kind.shape, self.kind.dtype, geometry, shape) != _layout(self.packed_weight):
            packed = _pack(self._plain_weight(), geometry, shape)
            self.packed_weight = nn.Parameter(packed, requires_grad=self.packed_weight.requires_grad)
            self.fitting, self.fitted_to = set(), shape
        self.fitting.add(shape)


class PackedGate(PackedLinear):
    """The projection of a GEGLU: value and gate packed apart, as GELU and the product belong to one of them each."""

    _packed_names = ("packed_value", "packed_gate")

    @staticmethod
    def _pack_weight(layer: Any, weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(half.contiguous()) for half in weight.chunk(2)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`: somebody wants both halves at once."""
        return self._as_plain(input)

    def gated(self, hidden_states: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor | None:
        """value * gelu(gate), each one product with its epilogue; None where that is not possible.

        Args:
            added: what an adapter adds to both.
        """
        if not self._can_compute(hidden_states) or hidden_states.ndim < 2:
            return None
        value_bias, gate_bias = (None, None) if self.bias is None else self.bias.chunk(2)
        if added is not None:
            gate = _linear(hidden_states, self.packed_gate, gate_bias, "none", [], "").add_(added.chunk(2, dim=-1)[1])
            value = _linear(hidden_states, self.packed_value, value_bias, "none", [], "")
            return value.add_(added.chunk(2, dim=-1)[0]).mul_(F.gelu(gate))
        gate = _linear(hidden_states, self.packed_gate, gate_bias, "gelu", [], "none")
        return _linear.binary(hidden_states, gate, self.packed_value, value_bias, "mul")


def _geometry(layer: nn.Conv2d) -> tuple:
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _pack(weight: torch.Tensor, geometry: tuple, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of a convolution as oneDNN wants it for inputs of a shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)


def _layout(packed: torch.Tensor) -> bytes:
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()[_LAYOUT:]


@functools.lru_cache(maxsize=1024)
def _wanted_layout(weight: torch.Size, dtype: torch.dtype, geometry: tuple, shape: torch.Size) -> bytes:
    """The layout that oneDNN wants; it says so by packing a weight."""
    empty = torch.empty(weight, dtype=dtype, memory_format=torch.channels_last)
    return _layout(_pack(empty, geometry, shape))
