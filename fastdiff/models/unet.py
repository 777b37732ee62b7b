"""`FastUNet2DConditionModel`: the stock UNet with work that does not change between steps taken out of the step."""

from __future__ import annotations

import functools
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import scale_lora_layers, unscale_lora_layers

from ..identity import stands_in_for
from .adapters import attaching
from .attention import FastAttention
from .base import FastModelMixin, hoist, prepare_compiled
from .context import ContextCache, attach_context_cache
from .conversion import share_weights
from .outputs import answers_by_name

_MAX_TIME_ROWS = 4096


@answers_by_name
class UNetSample(NamedTuple):
    """What the fast UNet returns: a tuple of one, whose element also goes by its stock name."""

    sample: torch.Tensor


@stands_in_for(UNet2DConditionModel)
class FastUNet2DConditionModel(FastModelMixin, UNet2DConditionModel):
    """SDXL's UNet, equal to the stock one within rounding.

    Made as a stock one is, or with `from_stock`. `forward` resolves on the host what the graph needs not see: the row
    of the sinusoidal time embedding, and the cross-attention keys and values of the prompt. What remains is one static
    region. It returns a tuple by default; `return_dict=True` gives the stock output object. Compiled by the user, all
    of it is one graph, but in calls of a fast pipeline, which looks both up before.

    Weights, state-dict keys and `save_pretrained` are those of `UNet2DConditionModel`. `revision` counts changes of
    adapters and processors, after which a plan has to be looked at again.
    """

    _repeated_blocks = ["BasicTransformerBlock"]
    _regions = ("BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D")

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]  # for `inspect`, which diffusers asks
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_fast()

    @classmethod
    def from_stock(cls, unet: UNet2DConditionModel) -> FastUNet2DConditionModel:
        """Make a fast UNet over the weights of a stock one: the same storages, no copy.

        Args:
            unet: a `UNet2DConditionModel`, also one compiled with `torch.compile` or with adapters loaded. It keeps
                working. A fast UNet is returned as it is.

        Raises:
            TypeError: if `unet` is no `UNet2DConditionModel`.
        """
        if isinstance(unet, cls):
            return unet
        fast = share_weights(unet, UNet2DConditionModel, cls)
        fast._make_fast()
        return fast

    def _make_fast(self) -> None:
        super()._make_fast()
        self.context_cache: ContextCache = attach_context_cache(self)
        self._time_rows: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._self_attentions = [m for m in self.modules() if isinstance(m, FastAttention) and not m.is_cross_attention]
        self.revision = 0

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> UNetSample | UNet2DConditionOutput:
        """Predict the noise. Arguments and meaning as in `UNet2DConditionModel.forward`.

        Args:
            sample: latents, (batch, channels, height, width).
            timestep: one timestep, or one a sample. A 0-dimensional CPU tensor costs no copy to the device once
                `prepare_timesteps` has seen it.
            encoder_hidden_states: prompt embeddings, (batch, tokens, cross_attention_dim).
            return_dict: False returns a tuple, True the stock output object.
        """
        embedding, context = timestep, encoder_hidden_states
        if not torch.compiler.is_compiling():
            embedding, context = self._hoisted(sample, timestep, encoder_hidden_states, cross_attention_kwargs)
        (denoised,) = self.denoise(
            sample,
            embedding,
            context,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=added_cond_kwargs,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )
        return UNet2DConditionOutput(sample=denoised) if return_dict else UNetSample(denoised)

    def _hoisted(
        self, sample: torch.Tensor, timestep: Any, context: Any, cross_attention_kwargs: dict | None
    ) -> tuple[torch.Tensor, Any]:
        """Time embedding and context of a call, looked up."""
        if self._fuse_wanted and getattr(self, "peft_config", None):
            # A pipeline's unfuse_lora() goes past the model and straight to the layers.
            changed = [attn for attn in self._self_attentions if attn.is_fused != attn.fuse()]
            self.revision += bool(changed)
        if "_orig_mod" in self.__dict__:
            prepare_compiled(self)  # made by accelerate's compile_regions, which compiles its blocks one by one
        if self._may_cache_context():
            with self._scaled_adapters(cross_attention_kwargs):
                context = self.context_cache.project(context)
        return self._time_embedding(sample, timestep), context

    def prepare_call(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the timestep and the context by what is looked up, outside of compiled code."""
        is_ours = type(self).forward is FastUNet2DConditionModel.forward and "forward" not in self.__dict__
        if torch.compiler.is_compiling() or not is_ours:
            return args, kwargs
        scales = kwargs.get("cross_attention_kwargs", args[6] if len(args) > 6 else None)
        return hoist(functools.partial(self._hoisted, cross_attention_kwargs=scales), args, kwargs)

    def denoise(self, sample, time_embedding, context, *args, **kwargs) -> tuple[torch.Tensor]:
        """The part of `forward` that runs on the device alone: what full-graph compilation and capture take."""
        return super().forward(sample, time_embedding, context, *args, **kwargs)

    def get_time_embed(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        """Upstream's hook: an embedding that `forward` has already looked up passes through."""
        if isinstance(timestep, torch.Tensor) and timestep.ndim == 2:
            return timestep
        return super().get_time_embed(sample, timestep)

    @torch.no_grad()
    def prepare_timesteps(self, timesteps: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Put the time embeddings of a schedule on the device before the loop, in one copy.

        Args:
            timesteps: (steps,), on the CPU.
            device: where the latents are.
            dtype: dtype of the latents.
        """
        steps = timesteps.tolist()
        if all((step, device, dtype) in self._time_rows for step in steps):
            return
        rows = self.time_proj(timesteps.to(device)).to(dtype)
        for step, row in zip(steps, rows.split(1), strict=True):
            self._time_rows[step, device, dtype] = row
        while len(self._time_rows) > max(_MAX_TIME_ROWS, len(steps)):
            self._time_rows.popitem(last=False)

    def free_caches(self) -> None:
        """Free the cached keys, values and time embeddings; they are made again when needed."""
        self.context_cache.clear()
        self._time_rows.clear()

    def load_lora_adapter(self, *args, **kwargs) -> None:
        """As upstream; fused layers stay fused, and quantized or packed ones what they are: an adapter adds to them."""
        # A hot swap writes into the tensors of an adapter that is there, and changes no layer.
        swaps = kwargs.get("hotswap") and kwargs.get("adapter_name") in getattr(self, "peft_config", {})
        with nullcontext() if swaps else self._changing_adapters(), attaching():
            super().load_lora_adapter(*args, **kwargs)

    def add_adapter(self, adapter_config, *args, **kwargs) -> None:
        """As upstream; see `load_lora_adapter`."""
        # An adapter that starts from the weights themselves (PiSSA, OLoRA, DoRA) has to see them.
        from_weights = getattr(adapter_config, "init_lora_weights", True) not in (True, False, "gaussian")
        reads = from_weights or getattr(adapter_config, "use_dora", False)
        with self._changing_adapters(), nullcontext() if reads else attaching():
            super().add_adapter(adapter_config, *args, **kwargs)

    def fuse_lora(self, *args, **kwargs) -> None:
        """As upstream."""
        with self._changing_adapters():
            super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args, **kwargs) -> None:
        """As upstream."""
        with self._changing_adapters():
            super().unfuse_lora(*args, **kwargs)

    def unload_lora(self, *args, **kwargs) -> None:
        """As upstream."""
        with self._changing_adapters(), attaching():
            super().unload_lora(*args, **kwargs)

    def delete_adapters(self, *args, **kwargs) -> None:
        """As upstream."""
        with self._changing_adapters(), attaching():
            super().delete_adapters(*args, **kwargs)

    @contextmanager
    def _changing_adapters(self):
        for attn in self._self_attentions:
            attn.show_parts()
        try:
            yield
        finally:
            self._after_layer_change()

    def _after_layer_change(self) -> None:
        super()._after_layer_change()
        self.context_cache.clear()
        self.revision += 1

    def _may_cache_context(self) -> bool:
        # An IP-Adapter or a text projection needs the context itself.
        return self.encoder_hid_proj is None and self.config.addition_embed_type in (None, "text_time")

    @contextmanager
    def _scaled_adapters(self, cross_attention_kwargs: dict | None):
        """The LoRA scale of a call, which upstream applies inside of its forward, for the cached projections too."""
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        layers = self.context_cache.layers if getattr(self, "peft_config", None) else []
        for layer in layers:
            scale_lora_layers(layer, scale)
        try:
            yield
        finally:
            for layer in layers:
                unscale_lora_layers(layer, scale)

    def _time_embedding(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        if isinstance(timestep, torch.Tensor) and timestep.ndim == 0 and timestep.device.type == "cpu":
            row = self._time_rows.get((timestep.item(), sample.device, sample.dtype))
            if row is not None:
                return row.expand(sample.shape[0], -1)
        return super().get_time_embed(sample, timestep)

    def _apply(self, fn, recurse: bool = True):
        # Time embeddings hold no weights: an offloaded UNet, moved in at the first step, keeps them.
        self.context_cache.clear()
        return super()._apply(fn, recurse)
