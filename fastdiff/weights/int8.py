"""Int8 products on CPUs: oneDNN's kernels over weights packed once, activations quantized to uint8 as they come.

Unsigned activations, as every x86 CPU with AVX2 has kernels for them: with signed ones all but those with AMX fall to
oneDNN's reference kernel, which is two thousand times slower. CPUs without VNNI sum the products of two neighbouring
inputs in 16 bits; there weights are scaled so that every such sum fits (|a + b| <= 128), which costs normally
distributed ones a quarter of their precision, and nothing is ever cut off. One scale and one zero point an input, which
go into the product's epilogue: a scale a row costs one more pass over the output and was not measured to be nearer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

from ..models.form import Form, Kind, Source
from .activations import quantize, quantize_padded, quantize_rows
from .int8_units import output_dtype, sums_in_16_bits
from .kept import give_up_and_keep, take_again

# Numbers of a weight that are quantized at a time: bounds the float32 copy.
_CHUNK = 1 << 20
# Rows that a feed-forward layer takes at a time. Half as many make slower products; twice as many leave the cache.
_ROWS = 1024
_LEVELS = 127
# Of two weights: times 255 it is the most that fits in 16 bits.
_LARGEST_PAIR = 128
_TINY = 1e-30


class Int8(Form):
    """A layer with an int8 weight, one scale an output feature, in oneDNN's layout.

    Activations are quantized in each call, with one scale and zero point for the whole input. Results are in the
    input's dtype. `held()` are the packed weights, one after the other along the output features.
    """

    _parts = 1
    _extras: tuple[str, ...] = ("weight_scale",)
    weight_scale: torch.Tensor
    bias: Any

    @classmethod
    def make(cls, layer: nn.Module, source: Source | None = None) -> None:
        """As `Form.make`; a form that was kept is taken again."""
        if not take_again(layer, cls, source):
            super().make(layer, source)

    def _show_weight(self) -> None:
        give_up_and_keep(self)

    @classmethod
    def _hold(cls, layer: Any, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return cls._hold_int8(layer, *_quantize_rows(weight))

    @classmethod
    def _hold_int8(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        layer.__dict__["weight_scale"] = scale = scale.float().contiguous()
        return {f"packed_{index}": packed for index, packed in enumerate(cls._packed(layer, weight, scale))}

    @classmethod
    @torch.no_grad()
    def restore(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Make a layer an int8 one in place that has no plain weight anywhere.

        Args:
            layer: gives its bias and sizes; its weight is let go.
            weight: of the plain weight's shape, int8.
            scale: (out_features,), float32.
        """
        kind = Kind(weight.shape, layer._parameters["weight"].dtype, weight.device, False)
        cls._take(layer, cls._hold_int8(layer, *_fitted(weight, scale)), kind, None)

    @classmethod
    def _packed(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError

    def int8_weight(self) -> torch.Tensor:
        """A plain copy of the int8 weight, of the plain weight's shape."""
        raise NotImplementedError

    def save_held(self, destination: dict, prefix: str) -> None:
        """Put what a quantized checkpoint holds of this layer into a dict of tensors."""
        destination[prefix + "weight_int8"] = self.int8_weight()
        destination[prefix + "weight_scale"] = self.weight_scale
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _follows(self, kind: Kind) -> bool:
        # Int8 whatever the layer's dtype is; so a cast costs nothing where there is no plain weight to cast.
        return kind == self.kind or (self.source is None and kind.device == self.kind.device)

    def __getstate__(self) -> dict:
        if self.source is not None:
            return super().__getstate__()
        state = {name: value for name, value in self.__dict__.items() if name not in self._extras}
        state["_parameters"] = {"bias": self.bias}
        return {**state, "int8": (self.int8_weight(), self.weight_scale)}

    def __setstate__(self, state: dict) -> None:
        int8 = state.pop("int8", None)
        if int8 is None:
            super().__setstate__(state)
            return
        nn.Module.__setstate__(self, state)
        self._take(self, self._hold_int8(self, *_fitted(*int8)), self.kind, None)


class Int8Linear(Int8, nn.Linear):
    """`nn.Linear` with an int8 weight."""

    _plain = nn.Linear

    @classmethod
    def _packed(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in weight.chunk(cls._parts)]

    def int8_weight(self) -> torch.Tensor:
        """A plain copy of the int8 weight, (out_features, in_features)."""
        return torch.cat([part.detach().to_dense().t() for part in self.held()])

    # The compiler takes neither packed weights nor a scale that is read on the way: it compiles around this.
    @torch.compiler.disable
    def _products(self, x: torch.Tensor, posts: tuple[str, ...]) -> list[torch.Tensor]:
        """The product with each part, each with its operation from `posts` applied."""
        values, x_scale, zero_point = quantize(x.detach())
        dtype = output_dtype(x.dtype)
        scales = self.weight_scale.chunk(self._parts)
        biases = (None,) * self._parts if self.bias is None else self.bias.to(dtype).chunk(self._parts)
        algorithm = "none"  # of GELU: the exact one
        return [
            torch.ops.onednn.qlinear_pointwise(
                values, x_scale, zero_point, weight, scale, _no_zero_points(), bias, 1.0, 0, dtype, post, [], algorithm
            ).to(x.dtype)
            for weight, scale, bias, post in zip(self.held(), scales, biases, posts, strict=True)
        ]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`. `input`: (..., in_features)."""
        if not self._can_compute(input):
            return self._as_plain(input)
        products = self._products(input, ("none",) * self._parts)
        return products[0] if self._parts == 1 else torch.cat(products, dim=-1)


class Int8Gate(Int8Linear):
    """The projection of a GEGLU: value and gate packed apart, as GELU belongs to the gate."""

    _parts = 2

    def gated(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor | None:
        """value * gelu(gate); the input is quantized once, and GELU is part of its product. None where it cannot.

        Args:
            added: what an adapter adds to both.
        """
        if not self._can_compute(x):
            return None
        if added is not None:
            value, gate = self._products(x, ("none", "none"))
            more, more_gate = added.chunk(2, dim=-1)
            return value.add_(more).mul_(F.gelu(gate.add_(more_gate)))
        value, gate = self._products(x, ("none", "gelu"))
        return value.mul_(gate)


class Int8Conv2d(Int8, nn.Conv2d):
    """`nn.Conv2d` with an int8 weight, for zero padding and one group; takes and returns channels_last.

    A zero point makes oneDNN's convolutions up to twice as slow where they pad. So the input comes padded, and what
    the zero point adds to each output, `x_scale * zero_point * weight_scale * sum(weight)`, is taken from the bias.
    """

    _plain = nn.Conv2d
    padding: Any
    _extras = ("weight_scale", "weight_sum")
    weight_sum: torch.Tensor

    @classmethod
    def _hold_int8(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        layer.__dict__["weight_sum"] = scale.float() * _sum_rows(weight)
        return super()._hold_int8(layer, weight, scale)

    @classmethod
    def _packed(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        # The size of the picture does not change the layout.
        shape = [2, layer.in_channels, 64, 64]
        arguments = (layer.stride, (0, 0), layer.dilation, layer.groups, shape)
        return [torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, 0, *arguments)]

    def int8_weight(self) -> torch.Tensor:
        """A plain copy of the int8 weight, (out_channels, in_channels, height, width)."""
        return self.held()[0].detach().to_dense().contiguous()

    def _plain_weight(self) -> torch.Tensor:
        return super()._plain_weight().contiguous(memory_format=torch.channels_last)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Conv2d`. `input`: (batch, channels, height, width)."""
        return self._product(input) if self._can_compute(input) else self._as_plain(input)

    @torch.compiler.disable
    def _product(self, input: torch.Tensor) -> torch.Tensor:
        values, x_scale, zero_point = quantize_padded(input.detach(), self.padding)
        if self.bias is None:
            bias = self.weight_sum * (-x_scale * zero_point)
        else:
            bias = torch.add(self.bias.float(), self.weight_sum, alpha=-x_scale * zero_point)
        return torch.ops.onednn.qconv_pointwise(
            values, x_scale, 0, self.held()[0], self.weight_scale, _no_zero_points(), bias, self.stride,
            (0, 0), self.dilation, self.groups, 1.0, 0, output_dtype(input.dtype), "none", [], "none",
        ).to(input.dtype)


class RowsFeedForward(FeedForward):
    """diffusers' `FeedForward`, some rows at a time, as what is between its products is several times as wide.

    Over int8 layers each part of the rows has scales of its own.
    """

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As upstream. `hidden_states`: (..., channels)."""
        rows = hidden_states.flatten(0, -2)
        parts = rows.chunk(max(1, -(-len(rows) // _ROWS)))
        if len(parts) == 1:
            return super().forward(hidden_states, *args, **kwargs)
        forward = super().forward
        return torch.cat([forward(part, *args, **kwargs) for part in parts]).view_as(hidden_states)


def convert_feed_forward(model: nn.Module) -> None:
    """Make feed-forward layers take their rows in parts, which is right whatever forms their layers have."""
    for module in model.modules():
        if type(module) is FeedForward:
            module.__class__ = RowsFeedForward


def _no_zero_points() -> torch.Tensor:
    # Of the weights.
    return torch.zeros(0, dtype=torch.int32)


def _sum_rows(weight: torch.Tensor) -> torch.Tensor:
    # In float32, which holds these sums exactly and is three times as fast as int32.
    return torch.cat([part.flatten(1).float().sum(dim=1) for part in weight.split(_rows_at_a_time(weight))])


def _rows_at_a_time(weight: torch.Tensor) -> int:
    return max(1, _CHUNK // weight[0].numel())


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    in_16_bits = sums_in_16_bits()
    if (found := quantize_rows(weight, in_16_bits)) is not None:
        return found
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32)
    rows = _rows_at_a_time(weight)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        largest = part.flatten(1).abs().amax(dim=1)
        if in_16_bits:
            largest = torch.maximum(largest, _largest_pairs(part))
        scale = largest.clamp_min_(_TINY).div_(_LEVELS)
        scales[start : start + rows] = scale
        values[start : start + rows] = part.div(scale.view(-1, *[1] * (part.ndim - 1))).round_()
    return values, scales


def _fitted(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An int8 weight and its scales, which may come from another CPU, such that this one's sums fit."""
    if not sums_in_16_bits():
        return weight, scale
    for rows in torch.arange(len(weight)).split(_rows_at_a_time(weight)):
        over = rows[_largest_pairs(weight[rows].float()) > _LARGEST_PAIR]
        if len(over):
            weight, scale = weight.clone(), scale.clone()
            plain = weight[over].float() * scale[over].view(-1, *[1] * (weight.ndim - 1))
            weight[over], scale[over] = _quantize_rows(plain)
    return weight, scale


def _largest_pairs(rows: torch.Tensor) -> torch.Tensor:
    """The largest |a + b| of neighbouring inputs 0 and 1, 2 and 3 and so on, in each row; 0 with one input."""
    paired = rows.shape[1] // 2 * 2
    sums = (rows[:, 0:paired:2] + rows[:, 1:paired:2]).flatten(1).abs_()
    return sums.amax(dim=1) if sums.shape[1] else rows.new_zeros(len(rows))
