"""Linear layers over torchao's quantized weights: fp8 and int8."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from ..models.form import Form, Kind, Source
from .schemes import why_no_fast_sums

# The largest value of a row is taken for at least this much.
_TINY = 1e-6


class TorchaoLinear(Form, nn.Linear):
    """`nn.Linear` over a weight that torchao has quantized, and computes with."""

    _plain = nn.Linear
    _extras = ("scheme",)
    scheme: str
    quantized_weight: torch.Tensor
    bias: Any

    @classmethod
    def quantize(cls, layer: nn.Module, source: Source | None, scheme: str) -> None:
        """Quantize a plain layer in place.

        Args:
            source: where its plain weight comes back from.
            scheme: of `FastConfig.quantization`.
        """
        layer.__dict__["scheme"] = scheme
        cls.make(layer, source)

    @classmethod
    def restore(cls, layer: nn.Module, weight: torch.Tensor, scheme: str) -> None:
        """Make a layer a quantized one in place that has no plain weight anywhere.

        Args:
            weight: torchao's tensor.
            scheme: that it was made with.
        """
        layer.__dict__["scheme"] = scheme
        cls._take(layer, {"quantized_weight": weight}, Kind(weight.shape, weight.dtype, weight.device, False), None)

    @classmethod
    def _hold(cls, layer: nn.Module, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        alone = nn.Linear(1, 1, bias=False, device="meta")
        alone.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(alone, torchao_config(layer.__dict__["scheme"]))
        return {"quantized_weight": alone.weight.data}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`. `input`: (..., in_features)."""
        if not self._can_compute(input):
            return self._as_plain(input)
        return F.linear(input, self.quantized_weight, self.bias)

    def save_held(self, destination: dict, prefix: str) -> None:
        """Put what a quantized checkpoint holds of this layer into a dict of tensors."""
        destination[prefix + "weight"] = self.quantized_weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _follows(self, kind: Kind) -> bool:
        # torchao's tensors move between devices; so offloading as a whole leaves the form.
        return kind.dtype == self.kind.dtype and kind.device.type != "meta"

    def _apply(self, fn, recurse: bool = True):
        after = fn(torch.empty(0, dtype=self.kind.dtype, device=self.kind.device))
        if after.device != self.kind.device and self._follows(self.kind._replace(device=after.device)):
            self._parameters["quantized_weight"] = nn.Parameter(fn(self.quantized_weight.data), requires_grad=False)
        return super()._apply(fn, recurse)


def torchao_config(scheme: str):
    """torchao's configuration of a scheme."""
    # set_inductor_config=False: otherwise torchao writes inductor's global configuration.
    if scheme == "fp8-dynamic":
        # Without a floor the scale of a row of zeros is 0, and the row becomes NaN.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(),
            activation_value_lb=_TINY,
            mm_config=Float8MMConfig(use_fast_accum=why_no_fast_sums() is None),
            set_inductor_config=False,
        )
    if scheme == "fp8-weight-only":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Int8WeightOnlyConfig(set_inductor_config=False)
