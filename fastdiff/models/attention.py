"""Self-attention with one fused QKV projection that shares its storage with `to_q`, `to_k` and `to_v`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .processor import FusedQKVAttnProcessor
from .storage import is_plain

_PARTS = ("to_q", "to_k", "to_v")


class FastAttention(Attention):
    """diffusers' `Attention` that is either fused (`to_qkv`) or separate (`to_q`, `to_k`, `to_v`), never both copies.

    Fusing moves the three weights into one storage and registers `to_qkv` in their place; `unfuse` registers them
    again as views of that storage. State-dict keys are the stock ones in either state, for saving and loading. With
    a merged LoRA the wrapped projections stay registered beside `to_qkv`, all over one storage, so that unmerging
    still finds them.
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
        for part in self._parts():
            if isinstance(part, BaseTunerLayer):
                if not part.merged or set(part.active_adapters) - set(part.merged_adapters):
                    return "an adapter is loaded and not fused"
                part = part.get_base_layer()
            if type(part) is not nn.Linear:
                return f"a projection is a {type(part).__name__}"
            if not is_plain(part.weight):
                return "its weights are quantized"
            if _is_hooked(part):
                return "a projection has hooks"
            if part.weight.device.type == "meta":
                return "its weights are not loaded"
        return None

    @torch.no_grad()
    def fuse(self) -> bool:
        """Fuse the three projections, or go back to separate ones where something speaks against it.

        Returns:
            Whether the layer is fused now.
        """
        if self.why_not_fused() is not None:
            self.unfuse()
            return False
        if self.is_fused:
            return True
        parts = [p.get_base_layer() if isinstance(p, BaseTunerLayer) else p for p in self._parts()]
        to_qkv = nn.Linear(1, 1, bias=parts[0].bias is not None, device="meta")
        to_qkv.in_features, to_qkv.out_features = parts[0].in_features, sum(p.out_features for p in parts)
        to_qkv.weight = _shared([p.weight for p in parts])
        if to_qkv.bias is not None:
            to_qkv.bias = _shared([p.bias for p in parts])
        to_qkv.train(self.training)
        if not any(isinstance(p, BaseTunerLayer) for p in self._parts()):
            for name in _PARTS:
                delattr(self, name)
        self.to_qkv = to_qkv
        self.fused_projections = True
        return True

    @torch.no_grad()
    def unfuse(self) -> None:
        """Go back to separate `to_q`, `to_k`, `to_v`: views of the fused storage, no copy."""
        if not self.is_fused:
            return
        if "to_q" not in self._modules:
            weights = _thirds(self.to_qkv.weight)
            biases = self.to_qkv.bias.chunk(3) if self.to_qkv.bias is not None else (None,) * 3
            for name, weight, bias in zip(_PARTS, weights, biases, strict=True):
                part = nn.Linear(1, 1, bias=bias is not None, device="meta")
                part.out_features, part.in_features = weight.shape
                part.weight = nn.Parameter(weight, requires_grad=self.to_qkv.weight.requires_grad)
                if bias is not None:
                    part.bias = nn.Parameter(bias, requires_grad=self.to_qkv.bias.requires_grad)
                setattr(self, name, part.train(self.training))
        del self.to_qkv
        self.fused_projections = False

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

    def _apply(self, fn, recurse: bool = True):
        # Moving or casting copies each parameter on its own. Where a merged LoRA keeps `to_q` beside `to_qkv`, the
        # shared storage has to be made again, or unmerging would write into a copy that nobody reads.
        shared = self.is_fused and "to_q" in self._modules
        result = super()._apply(fn, recurse)
        if shared:
            del self.to_qkv
            self.fuse()
        return result

    def _parts(self) -> list[Any]:
        """The separate projections; none when `to_qkv` has taken their place."""
        return [self._modules[name] for name in _PARTS if name in self._modules]

    def __getattr__(self, name: str):
        # Code that asks for a projection by its stock name gets it; the plan fuses anew before the next picture.
        if name in _PARTS and self.is_fused and "to_q" not in self._modules and is_plain(self.to_qkv.weight):
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


def _is_hooked(layer: nn.Linear) -> bool:
    """Whether somebody wants to see, or changes, what this layer alone computes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


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
        if joined is not None and "to_q" not in attn._modules:
            for name, part in zip(_PARTS, joined.chunk(3), strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = part


def _fuse_loaded_keys(attn: FastAttention, state_dict: dict, prefix: str, *args) -> None:
    if not attn.is_fused:
        return
    merged = "to_q" in attn._modules
    for kind in ("weight", "bias"):
        if getattr(attn.to_qkv, kind) is None:
            continue
        if merged:
            # The wrapped projections load their own keys into the same storage.
            state_dict[f"{prefix}to_qkv.{kind}"] = getattr(attn.to_qkv, kind).detach()
        elif all(f"{prefix}{name}.{kind}" in state_dict for name in _PARTS):
            parts = [state_dict.pop(f"{prefix}{name}.{kind}") for name in _PARTS]
            state_dict[f"{prefix}to_qkv.{kind}"] = torch.cat(parts)
