"""`FastUNet2DConditionModel`: the stock UNet with work that does not change between steps taken out of the step."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import scale_lora_layers, unscale_lora_layers

from ..identity import stands_in_for
from .attention import FastAttention, apply_fusion, convert_attention
from .context import attach_context_cache
from .conversion import share_weights
from .processor import FusedQKVAttnProcessor
from .projections import FusedProjectionsMixin

_MAX_TIME_ROWS = 4096


class UNetSample(NamedTuple):
    """What the fast UNet returns: a tuple of one, whose element also goes by its stock name."""

    sample: torch.Tensor


@stands_in_for(UNet2DConditionModel)
class FastUNet2DConditionModel(FusedProjectionsMixin, UNet2DConditionModel):
    """SDXL's UNet, equal to the stock one within rounding.

    Made with `from_stock`. `forward` resolves on the host what the graph needs not see: the row of the sinusoidal
    time embedding, and the cross-attention keys and values of the prompt. What remains is one static region. It
    returns a tuple by default; `return_dict=True` gives the stock output object.

    Weights, state-dict keys and `save_pretrained` are those of `UNet2DConditionModel`. `revision` counts changes of
    adapters and processors, after which a plan has to be looked at again.
    """

    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"]

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
        convert_attention(fast, FusedQKVAttnProcessor())
        fast.context_cache = attach_context_cache(fast)
        fast._time_rows = OrderedDict()
        fast._self_attentions = [m for m in fast.modules() if isinstance(m, FastAttention) and not m.is_cross_attention]
        fast.revision = 0
        return fast

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        *args,
        return_dict: bool = False,
        **kwargs,
    ) -> UNetSample | UNet2DConditionOutput:
        """Predict the noise. Arguments and meaning as in `UNet2DConditionModel.forward`.

        Args:
            sample: latents, (batch, channels, height, width).
            timestep: one timestep, or one a sample. A 0-dimensional CPU tensor costs no copy to the device once
                `prepare_timesteps` has seen it.
            encoder_hidden_states: prompt embeddings, (batch, tokens, cross_attention_dim).
            return_dict: False returns a tuple, True the stock output object.
        """
        if self._fuse_wanted and getattr(self, "peft_config", None):
            # A pipeline's unfuse_lora() goes past the model and straight to the layers.
            changed = [attn for attn in self._self_attentions if attn.is_fused != attn.fuse()]
            self.revision += bool(changed)
        context = encoder_hidden_states
        if self._may_cache_context():
            with self._scaled_adapters(kwargs.get("cross_attention_kwargs")):
                context = self.context_cache.project(encoder_hidden_states)
        embedding = self._time_embedding(sample, timestep)
        (denoised,) = self.denoise(sample, embedding, context, *args, return_dict=False, **kwargs)
        return UNet2DConditionOutput(sample=denoised) if return_dict else UNetSample(denoised)

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

    def set_attn_processor(self, processor) -> None:
        """As upstream; layers that get back fastdiff's processor are fused again.

        Raises:
            ValueError: the projections are fused and quantized, and a processor expects separate ones.
        """
        self._refuse_if_quantized("Attention processors cannot be changed")
        super().set_attn_processor(processor)

    def set_default_attn_processor(self) -> None:
        """As upstream: plain attention everywhere."""
        self._refuse_if_quantized("Attention processors cannot be changed")
        super().set_attn_processor(AttnProcessor2_0())
        super().set_default_attn_processor()

    def free_caches(self) -> None:
        """Free the cached keys, values and time embeddings; they are made again when needed."""
        self.context_cache.clear()
        self._time_rows.clear()

    def load_lora_adapter(self, *args, **kwargs) -> None:
        """As upstream; layers that get an adapter run with separate projections while it is not fused.

        Raises:
            ValueError: the layers are quantized.
        """
        self._refuse_if_quantized("A LoRA cannot be loaded")
        with self._changing_adapters():
            super().load_lora_adapter(*args, **kwargs)

    def add_adapter(self, *args, **kwargs) -> None:
        """As upstream; see `load_lora_adapter`."""
        self._refuse_if_quantized("An adapter cannot be added")
        with self._changing_adapters():
            super().add_adapter(*args, **kwargs)

    def fuse_lora(self, *args, **kwargs) -> None:
        """As upstream; written into the shared storage, so that the layers are fused again."""
        with self._changing_adapters():
            super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args, **kwargs) -> None:
        """As upstream; the layers with adapters run with separate projections again."""
        with self._changing_adapters():
            super().unfuse_lora(*args, **kwargs)

    def unload_lora(self, *args, **kwargs) -> None:
        """As upstream; all layers are fused again."""
        with self._changing_adapters():
            super().unload_lora(*args, **kwargs)

    def delete_adapters(self, *args, **kwargs) -> None:
        """As upstream."""
        with self._changing_adapters():
            super().delete_adapters(*args, **kwargs)

    def _refuse_if_quantized(self, what: str) -> None:
        if getattr(self, "quantized", None) is not None:
            raise ValueError(
                f"{what}: this UNet is quantized ({self.quantized.scheme}) and its plain weights are gone. Load the "
                "checkpoint anew and do it before the first call (a LoRA: load it, then pipe.fuse_lora() and "
                "pipe.unload_lora_weights()), or use quantization='none' or the preset 'exact'."
            )

    @contextmanager
    def _changing_adapters(self):
        # A quantized UNet has no adapters, and its projections stay as they are.
        if getattr(self, "quantized", None) is None:
            apply_fusion(self, False)
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
