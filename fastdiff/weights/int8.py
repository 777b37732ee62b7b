"""Int8 products on CPUs: oneDNN's kernels over weights packed once, activations quantized as they come."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import nn

from .opaque import deepcopy_sharing

# Rows of a weight that are quantized at a time: bounds the float32 copy.
_CHUNK = 1 << 20
# Numbers of an activation that are quantized at a time: the pass after finds them in the cache, and no fresh memory,
# whose pages cost most on a CPU, is touched. Below a few such blocks the calls cost more than that.
_BLOCK, _FEW_BLOCKS = 1 << 19, 4
# Rows that a feed-forward layer takes at a time. Half as many make slower products; twice as many leave the cache.
_ROWS = 1024
_LEVELS = 127
_TINY = 1e-30

REFUSAL = (
    "This layer is quantized and its plain weight is gone. Do what needs the weights (fuse a LoRA, load an "
    "IP-Adapter, unfuse projections) before the first call, or use quantization='none'."
)


class Int8Linear(nn.Linear):
    """`nn.Linear` with an int8 weight, one scale an output feature, in oneDNN's layout.

    Activations are quantized in each call, with one scale for the whole input: it goes into the product's epilogue,
    where a scale for every token would cost one more pass over the output. Results are in the input's dtype. No
    gradients. `packed_parts` are the packed weights, one after the other along the output features.
    """

    _parts = 1
    weight_scale: torch.Tensor

    @classmethod
    @torch.no_grad()
    def quantize(cls, layer: nn.Linear) -> None:
        """Quantize a linear layer in place; its plain weight is let go."""
        weight, scale = _quantize_rows(layer.weight.detach())
        cls.restore(layer, weight, scale)

    @classmethod
    @torch.no_grad()
    def restore(cls, layer: Any, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Make a linear layer an int8 one in place.

        Args:
            layer: gives its bias and sizes; its weight is let go.
            weight: (out_features, in_features), int8.
            scale: (out_features,), float32.
        """
        parameters = {} if layer.bias is None else {"bias": layer._parameters["bias"]}
        layer.__class__ = cls
        layer._parameters = {"bias": None, **parameters}
        layer._pack(weight, scale)

    def _pack(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        for index, part in enumerate(weight.chunk(self._parts)):
            packed = torch.ops.onednn.qlinear_prepack(part.contiguous(), None)
            self._parameters[f"packed_{index}"] = nn.Parameter(packed, requires_grad=False)
        self.__dict__["weight_scale"] = scale.float().contiguous()

    def packed_parts(self) -> list[Any]:
        """The packed weights."""
        return [self._parameters[f"packed_{index}"] for index in range(self._parts)]

    def int8_weight(self) -> torch.Tensor:
        """A plain copy of the int8 weight, (out_features, in_features)."""
        return torch.cat([part.detach().to_dense().t() for part in self.packed_parts()])

    # The compiler takes neither packed weights nor a scale that is read on the way: it compiles around this.
    @torch.compiler.disable
    def _products(self, x: torch.Tensor, posts: tuple[str, ...]) -> list[torch.Tensor]:
        """The product with each part, each with its operation from `posts` applied."""
        quantized, scale = _quantize_input(x.detach())
        scales = self.weight_scale.chunk(self._parts)
        biases = (None,) * self._parts if self.bias is None else self.bias.chunk(self._parts)
        algorithm = "none"  # of GELU: the exact one
        return [
            torch.ops.onednn.qlinear_pointwise(
                quantized, scale, 0, weight, weight_scale, torch.zeros(0, dtype=torch.int32), bias, 1.0, 0, x.dtype,
                post, [], algorithm,
            )
            for weight, weight_scale, bias, post in zip(self.packed_parts(), scales, biases, posts, strict=True)
        ]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`. `input`: (..., in_features)."""
        products = self._products(input, ("none",) * self._parts)
        return products[0] if self._parts == 1 else torch.cat(products, dim=-1)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]  # what stands in its place is never there
        """Not there any more.

        Raises:
            ValueError: always, and says what to do.
        """
        raise ValueError(REFUSAL)

    def _apply(self, fn, recurse: bool = True):
        # Packed weights are for this CPU, and int8 whatever the layer's dtype is.
        if fn(torch.empty(0)).device.type != "cpu":
            raise ValueError(
                "This model is quantized for CPU (int8-dynamic) and cannot be moved. Load the checkpoint anew and "
                "move it before the first call, or use quantization='none'."
            )
        parameters = self._parameters
        self._parameters = {"bias": parameters["bias"]}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = {**parameters, **self._parameters}
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight_int8"] = self.int8_weight()
        destination[prefix + "weight_scale"] = self.weight_scale
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        names = ["weight_int8", "weight_scale"] + ["bias"] * (self.bias is not None)
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        missing.extend(absent)
        if absent:
            return
        weight, scale = state_dict[prefix + "weight_int8"], state_dict[prefix + "weight_scale"]
        if weight.dtype != torch.int8 or weight.shape != (self.out_features, self.in_features):
            errors.append(f"{prefix}weight_int8 is {weight.dtype}, {tuple(weight.shape)}")
            return
        self._pack(weight, scale)
        if self.bias is not None:
            self.bias.copy_(state_dict[prefix + "bias"])

    def __getstate__(self) -> dict:
        # torch cannot write packed weights: pickles hold plain ones.
        state = self.__dict__.copy()
        state["_parameters"] = {"bias": self.bias}
        return {**state, "int8_weight": self.int8_weight()}

    def __setstate__(self, state: dict) -> None:
        weight = state.pop("int8_weight")
        super().__setstate__(state)
        self._pack(weight, self.weight_scale)

    def __deepcopy__(self, memo: dict):
        return deepcopy_sharing(self, self.packed_parts(), memo)


class Int8Gate(Int8Linear):
    """The projection of a GEGLU: value and gate packed apart, as GELU belongs to the gate."""

    _parts = 2

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """value * gelu(gate); the input is quantized once, and GELU is part of its product."""
        value, gate = self._products(x, ("none", "gelu"))
        return value.mul_(gate)


class Int8GEGLU(GEGLU):
    """diffusers' `GEGLU` over an `Int8Gate`."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As upstream. `hidden_states`: (..., channels)."""
        return self.proj.gated(hidden_states)


class Int8FeedForward(FeedForward):
    """diffusers' `FeedForward` over int8 layers, some rows at a time: what is between them is several times as wide.

    Each part of the rows has scales of its own.
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
    """Make those feed-forward layers of a model `Int8FeedForward` whose both products are int8."""
    module: Any
    for module in model.modules():
        if type(module) is FeedForward and type(module.net[0]) is Int8GEGLU and type(module.net[-1]) is Int8Linear:
            module.__class__ = Int8FeedForward


def _quantize_input(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Int8 values and the scale that they are to be multiplied with.

    Four passes and no more: these operators take as long as a fifth of the product. A value that is not finite makes
    the scale, and so the output, not finite. `aminmax` because norms are slow on CPUs.
    """
    low, high = torch.aminmax(x)
    scale = max(high.item(), -low.item(), _TINY) / _LEVELS
    if x.numel() <= _FEW_BLOCKS * _BLOCK:
        return (x * (1 / scale)).round_().to(torch.int8), scale
    values, block = torch.empty(x.numel(), dtype=torch.int8), torch.empty(_BLOCK, dtype=x.dtype)
    for part, ints in zip(x.reshape(-1).split(_BLOCK), values.split(_BLOCK), strict=True):
        ints.copy_(torch.mul(part, 1 / scale, out=block[: len(part)]).round_())
    return values.view(x.shape), scale


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        scale = part.abs().amax(dim=1).clamp_min_(_TINY).div_(_LEVELS)
        scales[start : start + rows] = scale
        values[start : start + rows] = part.div_(scale[:, None]).round_()
    return values, scales
