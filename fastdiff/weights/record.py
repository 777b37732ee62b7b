"""What was quantized in a model, and how much its weights take."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..models.storage import leaves
from .int8 import Int8
from .torchao_form import TorchaoLinear


@dataclass(frozen=True)
class Quantized:
    """What was quantized in a model.

    Attributes:
        scheme: of `FastConfig.quantization`.
        taken: how many layers.
        left: how many linear layers were left, by reason.
        bytes_before, bytes_after: of the weights of the layers taken.
        model_before, model_after: of all weights.
        reason: why this scheme.
        kept: bytes of plain weights in host memory, of layers whose plain weights no file holds.
    """

    scheme: str
    taken: int
    left: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    model_before: int = 0
    model_after: int = 0
    reason: str = ""
    kept: int = 0

    @classmethod
    def of(cls, model: nn.Module, scheme: str, left: dict[str, int], reason: str) -> Quantized:
        """What is quantized in a model now."""
        layers = [module for module in model.modules() if isinstance(module, Int8 | TorchaoLinear)]
        before = sum(layer.kind.shape.numel() * layer.kind.dtype.itemsize for layer in layers)
        after, total = sum(map(weight_bytes, layers)), weight_bytes(model)
        kept = sum(layer.source.nbytes for layer in layers if layer.source is not None)
        return cls(scheme, len(layers), left, before, after, total - after + before, total, reason, kept)

    def describe(self) -> str:
        """One line for `explain()`."""
        parts = [
            f"{self.scheme}: {self.taken} layers, {_mib(self.bytes_before)} -> {_mib(self.bytes_after)} MiB "
            f"(model {_mib(self.model_before)} -> {_mib(self.model_after)} MiB)"
        ]
        if self.left:
            parts.append("left: " + ", ".join(f"{count} {why}" for why, count in self.left.items()))
        if self.kept:
            parts.append(f"plain copies of weights that no file holds: {_mib(self.kept)} MiB of host memory")
        return "; ".join([*parts, self.reason])


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, scales included."""
    total = sum(leaf.nbytes for parameter in module.parameters() for leaf in leaves(parameter))
    return total + sum(m.weight_scale.nbytes for m in module.modules() if isinstance(m, Int8))


def _mib(count: int) -> int:
    return round(count / 2**20)
