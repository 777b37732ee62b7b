"""Self-attention with one fused QKV projection that shares its storage with `to_q`, `to_k` and `to_v`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapters import added_by, is_hooked, why_not_beside
from .form import Form
from .fused_part import FusedPart
from .processor import FusedQKVAttnProcessor
from .storage import is_plain

_PARTS = ("to_q", "to_k", "to_v")


class FastAttention(Attention):
    """diffusers' `Attention` that is either fused (`to_qkv`) or separate (`to_q`, `to_k`, `to_v`), never both copies.

    Fusing moves the three weights into one storage and registers `to_qkv` in their place; `unfuse` registers them
    again as views of that storage. State-dict keys are the stock ones in either state, for saving and loading. Where an
    adapter wraps a projection, it stays registered beside `to_qkv`, over a `FusedPart` without a weight.
    """

    @classmethod
    def from_stock(cls, attn: Attention) -> FastAttention:
        """Turn a stock attention module into a fast one, in place; returns it."""
        if type(attn) is Attention:
            attn.__class__ = cls
            attn.register_state_dict_post_hook(_split_saved_keys)
            attn.register_load_state_dict_pre_hook(_fuse_loaded_keys)
        return attn

    @property
    def is_fused(self) -> bool:
        """True while self-attention runs through `to_qkv`."""
        return self._modules.get("to_qkv") is not None

    def why_not_fused(self) -> str | None:
        """The reason why this layer has to keep separate projections now, or None when it can be fused."""
        if self.is_cross_attention or self.only_cross_attention:
            return "cross-attention"
        if not isinstance(self.processor, FusedQKVAttnProcessor):
            return f"its processor is {type(self.processor).__name__}"
        if self.spatial_norm is not None:
            return "it has a spatial norm"
        reasons = (self._why_not_fused(part) for part in self._parts())
        return next((reason for reason in reasons if reason is not None), None)

    @staticmethod
    def _why_not_fused(part: Any) -> str | None:
        base = part.get_base_layer() if isinstance(part, BaseTunerLayer) else part
        if isinstance(part, BaseTunerLayer) and (why := why_not_beside(part)) is not None:
            return why
        if is_hooked(part) or is_hooked(base):
            return "a projection has hooks"
        if isinstance(base, Form):
            return None if base.can_give_up() else "its weights are quantized"
        if type(base) is not nn.Linear:
            return f"a projection is a {type(base).__name__}"
        if not is_plain(base.weight):
            return "its weights are quantized"
        return "its weights are not loaded" if base.weight.device.type == "meta" else None

    @torch.no_grad()
    def fuse(self) -> bool:
        """Fuse the three projections, or go back to separate ones where something speaks against it.

        Returns:
            Whether the layer is fused now.
        """
        if self.why_not_fused() is not None:
            self.unfuse()
            return False
        if not self.is_fused:
            bases = [_base(part) for part in self._parts()]
            weights = [base.weight for base in bases]
            to_qkv = nn.Linear(1, 1, bias=bases[0].bias is not None, device="meta")
            to_qkv.in_features, to_qkv.out_features = bases[0].in_features, sum(base.out_features for base in bases)
            to_qkv.weight = _shared(weights)
            if to_qkv.bias is not None:
                to_qkv.bias = _shared([base.bias for base in bases])
            self.to_qkv = to_qkv.train(self.training)
            self.fused_projections = True
            self._hide_parts()
        elif not any(isinstance(part, BaseTunerLayer) for part in self._parts()):
            self._hide_parts()
        return True

    @torch.no_grad()
    def unfuse(self) -> None:
        """Go back to separate `to_q`, `to_k`, `to_v`: views of the fused storage, no copy."""
        if not self.is_fused:
            return
        self.show_parts()
        weights = _thirds(self.to_qkv.weight)
        biases = self.to_qkv.bias.chunk(3) if self.to_qkv.bias is not None else (None,) * 3
        for part, weight, bias in zip(map(_base, self._parts()), weights, biases, strict=True):
            part._become_plain(weight)
            if bias is not None:
                part.bias = nn.Parameter(bias, requires_grad=self.to_qkv.bias.requires_grad)
        # Not deleted: somebody may be on a way through the modules, and has asked for a weight.
        self._modules["to_qkv"] = None
        self.fused_projections = False

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a fused layer: one product, and what adapters add to each."""
        parts = self._parts()
        if not parts:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        added = [added_by(part, hidden_states) if isinstance(part, BaseTunerLayer) else None for part in parts]
        if not self.is_fused:  # a merged adapter, switched off, was taken out of the weights
            return tuple(part(hidden_states) for part in self._parts())
        plain = self.to_qkv(hidden_states).chunk(3, dim=-1)
        return tuple(x if more is None else x + more for x, more in zip(plain, added, strict=True))

    def show_parts(self) -> None:
        """Have the parts of a fused projection stand where stock's are, so that an adapter finds them."""
        if not self.is_fused or all(name in self._modules for name in _PARTS):
            return
        for index, name in enumerate(_PARTS):
            if name not in self._modules:
                setattr(self, name, FusedPart.of(self, index))
        # In stock's order, in which adapters are drawn at random.
        for name in (*_PARTS, "to_qkv", "to_out"):
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)

    def _hide_parts(self) -> None:
        """Let go of the separate weights: where an adapter is, a part stays without."""
        for index, name in enumerate(_PARTS):
            if not isinstance(part := self._modules.get(name), BaseTunerLayer):
                self._modules.pop(name, None)
            elif not isinstance(part.get_base_layer(), FusedPart):
                part.base_layer = FusedPart.of(self, index)
        if any(name in self._modules for name in _PARTS):
            self.show_parts()

    def fuse_projections(self, fuse: bool = True) -> None:
        """Upstream's hook, called by `fuse_qkv_projections()`: the same result without the second copy."""
        self.fuse() if fuse else self.unfuse()

    def set_processor(self, processor) -> None:
        """Set a processor. One that fastdiff does not own gets back the separate projections that it expects."""
        if type(processor) is FusedAttnProcessor2_0:
            # diffusers' own over fused projections; on cross-attention it wants a second copy of keys and values.
            processor = FusedQKVAttnProcessor()
        if not isinstance(processor, FusedQKVAttnProcessor):
            self.unfuse()
        super().set_processor(processor)

    def _parts(self) -> list[Any]:
        """The separate projections; none when `to_qkv` has taken their place."""
        return [self._modules[name] for name in _PARTS if name in self._modules]

    def __getattr__(self, name: str):
        # Code that asks for a projection by its stock name gets it; the plan fuses anew before the next picture.
        if name in _PARTS and name not in self._modules and self.is_fused:
            self.unfuse()
        return super().__getattr__(name)


def convert_attention(module: nn.Module, processor: FusedQKVAttnProcessor) -> None:
    """Make every stock `Attention` in `module` a `FastAttention`, and give `processor` to those on stock SDPA."""
    for attn in _attentions(module):
        FastAttention.from_stock(attn)
        if type(attn.processor) is AttnProcessor2_0:
            attn.set_processor(processor)


def apply_fusion(module: nn.Module, enabled: bool) -> tuple[int, dict[str, int]]:
    """Fuse, or unfuse, every self-attention of `module`.

    Returns:
        The number of fused layers, and for the self-attention layers left separate how many for which reason.
    """
    fused = 0
    left: dict[str, int] = {}
    for attn in _attentions(module):
        if not isinstance(attn, FastAttention) or attn.is_cross_attention:
            continue
        if not enabled:
            attn.unfuse()
        elif attn.fuse():
            fused += 1
        else:
            reason = attn.why_not_fused() or ""
            left[reason] = left.get(reason, 0) + 1
    return fused, left


def _attentions(module: nn.Module) -> Iterator[Attention]:
    return (child for child in module.modules() if isinstance(child, Attention))


def _thirds(weight: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a fused weight for queries, keys and values: views, also of one that the user has quantized."""
    rows = weight.shape[0] // 3
    try:
        return [weight[start : start + rows] for start in (0, rows, 2 * rows)]
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            "These projections are fused and quantized, and cannot be taken apart: unfuse them, or load what needs "
            "them separate, before the first call, or use quantization='none'."
        ) from error


def _base(part: Any) -> Any:
    return part.get_base_layer() if isinstance(part, BaseTunerLayer) else part


def _shared(params: list[nn.Parameter]) -> nn.Parameter:
    """One parameter over the storage of `params`, joined along dimension 0, each of which becomes a view of it.

    Parameters that already lie behind one another in one storage (after `unfuse`) are joined without a copy.
    """
    first = params[0]
    adjacent = all(p.is_contiguous() for p in params) and all(
        p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and p.storage_offset() == before.storage_offset() + before.numel()
        for before, p in zip(params, params[1:], strict=False)
    )
    shape = (sum(p.shape[0] for p in params), *first.shape[1:])
    if adjacent:
        joined = first.detach().as_strided(shape, first.new_empty(shape, device="meta").stride())
    else:
        joined = torch.cat([p.detach() for p in params])
        for p, view in zip(params, joined.split([p.shape[0] for p in params]), strict=True):
            p.data = view
    return nn.Parameter(joined, requires_grad=first.requires_grad)


def _split_saved_keys(attn: FastAttention, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for kind in ("weight", "bias"):
        joined = state_dict.pop(f"{prefix}to_qkv.{kind}", None)
        if joined is not None and not attn._parts():
            for name, part in zip(_PARTS, joined.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = part


def _fuse_loaded_keys(attn: FastAttention, state_dict: dict, prefix: str, *args) -> None:
    if not attn.is_fused:
        return
    if attn._parts():
        # What adapters wrap loads its own weight. Only adapters' keys leave it as it is.
        names = [f"{prefix}{name}{inner}.weight" for name in _PARTS for inner in ("", ".base_layer")]
        if any(name in state_dict for name in names):
            attn.unfuse()
        return
    for kind in ("weight", "bias"):
        if getattr(attn.to_qkv, "_parameters", {}).get(kind, "form") is None:
            continue
        if all(f"{prefix}{name}.{kind}" in state_dict for name in _PARTS):
            parts = [state_dict.pop(f"{prefix}{name}.{kind}") for name in _PARTS]
            state_dict[f"{prefix}to_qkv.{kind}"] = torch.cat(parts)
