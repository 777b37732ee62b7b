"""The methods by which a model's projections are fused and its attention processors set, once for every fast model."""

from __future__ import annotations

from typing import Any

from .attention import apply_fusion

# To a type checker the stock class that the mixin comes before, whatever it is.
_Stock: Any = object


class FusedProjectionsMixin(_Stock):
    """diffusers' methods over `FastAttention`. Mixed in before a stock model class.

    Whether fused projections are wanted outlives what takes them apart for a while: another processor, an adapter.
    """

    _fuse_wanted = False

    def fuse_qkv_projections(self) -> None:
        """Fuse every self-attention into one projection, without a second copy of the weights."""
        self._fuse_wanted = True
        apply_fusion(self, True)

    def unfuse_qkv_projections(self) -> None:
        """Go back to separate projections."""
        self._fuse_wanted = False
        apply_fusion(self, False)

    def set_attn_processor(self, processor) -> None:
        """As upstream; layers that get back fastdiff's processor are fused again."""
        super().set_attn_processor(processor)
        self._after_layer_change()

    def _after_layer_change(self) -> None:
        """Processors or adapters have changed: a model that keeps what it got from its layers lets go of it here."""
        apply_fusion(self, self._fuse_wanted)
