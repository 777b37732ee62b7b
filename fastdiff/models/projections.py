"""The methods by which a model's projections are fused and its attention processors set, once for every fast model."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

from .attention import apply_fusion
from .processor import FusedQKVAttnProcessor

# To a type checker the stock class that the mixin comes before, whatever it is.
_Stock: Any = object


class FusedProjectionsMixin(_Stock):
    """diffusers' methods over `FastAttention`. Mixed in before a stock model class.

    Whether fused projections are wanted outlives what takes them apart for a while: another processor, an adapter.
    """

    _fuse_wanted = False
    # What the user asked for, which the plan leaves as it is; None while nobody did.
    fuse_choice: bool | None = None
    original_attn_processors: dict | None = None

    def fuse_qkv_projections(self) -> None:
        """Fuse every self-attention into one projection, without a second copy of the weights.

        As in stock, processors are replaced, and come back with `unfuse_qkv_projections`; those with weights of their
        own (IP-Adapters) stay.

        Raises:
            ValueError: the model has added key and value projections.
        """
        before = self.attn_processors
        if any("Added" in type(processor).__name__ for processor in before.values()):
            raise ValueError("`fuse_qkv_projections()` is not supported for models having added KV projections.")
        self.fuse_choice = True
        if self.original_attn_processors is None:
            self.original_attn_processors = before
        ours = FusedQKVAttnProcessor()
        self._fuse_wanted = True
        self.set_attn_processor({name: p if isinstance(p, nn.Module) else ours for name, p in before.items()})

    def unfuse_qkv_projections(self) -> None:
        """Go back to separate projections, and to the processors from before fusing but where others were set since."""
        self.fuse_choice = False
        self._fuse_wanted = False
        if self.original_attn_processors is not None:
            before, self.original_attn_processors = self.original_attn_processors, None
            fused = (FusedQKVAttnProcessor, FusedAttnProcessor2_0)  # the latter is what stock pipelines set themselves
            now = self.attn_processors
            self.set_attn_processor({name: before[name] if isinstance(p, fused) else p for name, p in now.items()})
        self.want_fusion(False)

    def want_fusion(self, wanted: bool) -> tuple[int, dict[str, int]]:
        """Fuse or unfuse by the plan; see `apply_fusion`. The user's choice is the caller's to ask for."""
        self._fuse_wanted = wanted
        return apply_fusion(self, wanted)

    def set_attn_processor(self, processor) -> None:
        """As upstream; layers that get back fastdiff's processor are fused again."""
        super().set_attn_processor(processor)
        self._after_layer_change()

    def set_default_attn_processor(self) -> None:
        """As upstream: plain attention everywhere."""
        # Upstream looks the classes up in a list of its own.
        ours, plain = FusedQKVAttnProcessor, AttnProcessor2_0()
        now = self.attn_processors
        super().set_attn_processor({name: plain if type(p) is ours else p for name, p in now.items()})
        super().set_default_attn_processor()

    def _after_layer_change(self) -> None:
        """Processors or adapters have changed: a model that keeps what it got from its layers lets go of it here."""
        apply_fusion(self, self._fuse_wanted)
