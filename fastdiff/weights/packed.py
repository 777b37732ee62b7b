"""Layers over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from .opaque import deepcopy_sharing

# PyTorch's operators over packed weights are what its compiler emits for CPUs; they have no public eager name yet.
_linear = torch.ops.mkldnn._linear_pointwise
_convolution = torch.ops.mkldnn._convolution_pointwise

# Below this many weights reordering costs less than the way through Python.
_MIN_WEIGHTS = 16_384

# Packed convolutions whose channels do not fill oneDNN's blocks can end in its reference kernel: 20 times slower.
_BLOCK = 64


def is_packable(layer: Any) -> bool:
    """Whether a layer is plain, large enough, and one that oneDNN has a fast kernel for."""
    if type(layer) not in (nn.Linear, nn.Conv2d) or layer.weight.numel() < _MIN_WEIGHTS:
        return False
    if type(layer.weight.data) is not torch.Tensor:
        # A quantized weight, whose kind says how it is laid out.
        return False
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or not _is_channels_last(layer):
            return False
        if layer.in_channels % _BLOCK or layer.out_channels % _BLOCK:
            return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.bfloat16, torch.float32)


def _is_channels_last(convolution: nn.Conv2d) -> bool:
    return convolution.weight.is_contiguous(memory_format=torch.channels_last)


# To a type checker the layer that the mixin comes before, whatever it is.
_Layer: Any = object


class Packed(_Layer):
    """A layer that holds its weight in oneDNN's layout, and turns back into what it was when the weight is asked for.

    So whatever edits, merges, moves, casts or differentiates the weight works on a plain layer, as in stock, and the
    plan packs it anew when it is next applied. State-dict keys and values are the stock ones; saving makes plain
    copies for as long as it takes.
    """

    _plain: type
    _parameters: dict[str, Any]
    _packed_names: tuple[str, ...] = ("packed_weight",)

    @classmethod
    @torch.no_grad()
    def pack(cls, layer: Any) -> None:
        """Pack a plain layer in place."""
        weight, others = layer.weight, {name: p for name, p in layer._parameters.items() if name != "weight"}
        packed = [nn.Parameter(p, requires_grad=weight.requires_grad) for p in cls._pack_weight(layer, weight.detach())]
        layer._parameters = {**dict(zip(cls._packed_names, packed, strict=True)), **others}
        layer.__class__ = cls

    @torch.no_grad()
    def unpack(self) -> None:
        """Turn into a plain layer."""
        others = {name: p for name, p in self._parameters.items() if name not in self._packed_names}
        weight = nn.Parameter(self._plain_weight(), requires_grad=self._packed()[0].requires_grad)
        self._parameters = {"weight": weight, **others}
        self.__class__ = self._plain

    @property
    def weight(self) -> Any:
        """The plain weight. Asking for it ends packing: it may be about to be edited."""
        self.unpack()
        return self.weight

    def _packed(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self._packed_names]

    def _plain_weight(self) -> torch.Tensor:
        return torch.cat([p.detach().to_dense() for p in self._packed()])

    def _can_compute(self, x: torch.Tensor) -> bool:
        """False for inputs that packed kernels do not take: another dtype (autocast), or gradients wanted."""
        weight = self._parameters[self._packed_names[0]]
        if x.dtype is not weight.dtype or x.device.type != "cpu":
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))

    def _as_plain(self, *args) -> torch.Tensor:
        self.unpack()
        return type(self).forward(self, *args)

    def __setattr__(self, name: str, value) -> None:
        if name == "weight":
            self.unpack()
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn, recurse: bool = True):
        # A move or cast that changes nothing, as every plan makes one, leaves the layer packed.
        before = self._packed()[0]
        after = fn(torch.empty(0, dtype=before.dtype, device=before.device))
        if (after.dtype, after.device) != (before.dtype, before.device):
            self.unpack()
            return self._apply(fn, recurse)
        parameters = self._parameters
        self._parameters = {name: p for name, p in parameters.items() if name not in self._packed_names}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = {name: self._parameters.get(name, p) for name, p in parameters.items()}
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._plain_weight()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args) -> None:
        packing = type(self)
        self.unpack()
        self._load_from_state_dict(*args)
        if is_packable(self):
            packing.pack(self)

    def __deepcopy__(self, memo: dict):
        return deepcopy_sharing(self, self._packed(), memo)


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]  # `weight` is set by `__setattr__`
    """`nn.Linear` over a packed weight."""

    _plain = nn.Linear

    @staticmethod
    def _pack_weight(layer: nn.Linear, weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`."""
        if not self._can_compute(input) or input.ndim < 2:
            return self._as_plain(input)
        return _linear(input, self.packed_weight, self.bias, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):  # type: ignore[override]  # `weight` is set by `__setattr__`
    """`nn.Conv2d` over a packed weight; returns channels_last."""

    _plain = nn.Conv2d

    @staticmethod
    def _pack_weight(layer: nn.Conv2d, weight: torch.Tensor) -> list[torch.Tensor]:
        # The size of the picture does not change the layout.
        return [
            torch.ops.mkldnn._reorder_convolution_weight(
                weight, layer.padding, layer.stride, layer.dilation, layer.groups, [2, layer.in_channels, 64, 64]
            )
        ]

    def _plain_weight(self) -> torch.Tensor:
        return super()._plain_weight().contiguous(memory_format=torch.channels_last)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Conv2d`."""
        if not self._can_compute(input) or input.ndim != 4:
            return self._as_plain(input)
        return _convolution(
            input, self.packed_weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class PackedGate(PackedLinear):
    """The projection of a GEGLU: value and gate packed apart, as GELU and the product belong to one of them each."""

    _packed_names = ("packed_value", "packed_gate")

    @staticmethod
    def _pack_weight(layer: nn.Linear, weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(half.contiguous()) for half in weight.chunk(2)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`: somebody wants both halves at once."""
        return self._as_plain(input)

    def gated(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """value * gelu(gate), each one product with its epilogue; None where that is not possible."""
        is_hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__
        if is_hooked or not self._can_compute(hidden_states) or hidden_states.ndim < 2:
            return None
        value_bias, gate_bias = (None, None) if self.bias is None else self.bias.chunk(2)
        gate = _linear(hidden_states, self.packed_gate, gate_bias, "gelu", [], "none")
        return _linear.binary(hidden_states, gate, self.packed_value, value_bias, "mul")


class PackedGEGLU(GEGLU):
    """diffusers' `GEGLU`, whose GELU and product cost no pass over memory while its projection is packed."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As upstream. `hidden_states`: (..., channels)."""
        if isinstance(self.proj, PackedGate) and (gated := self.proj.gated(hidden_states)) is not None:
            return gated
        return super().forward(hidden_states, *args, **kwargs)
