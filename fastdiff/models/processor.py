"""The attention processor over fused projections and over keys and values computed before the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from .context import ContextKV


class FusedQKVAttnProcessor(AttnProcessor2_0):
    """Scaled dot-product attention over `attn.to_qkv`, or over keys and values computed before the loop.

    Takes the place of diffusers' `AttnProcessor2_0` and equals it. Three cases:

    - self-attention of a fused `FastAttention`: one projection `to_qkv` in place of three;
    - cross-attention whose `encoder_hidden_states` is a `ContextKV`: only `to_q` is computed;
    - all else (a layer with an active LoRA, a context that is not cached): the stock processor, or with an attention
      backend, which that does not know, the separate projections.

    `model.set_attention_backend(name)` sets the backend, as on diffusers' newer models; without one, PyTorch chooses.

    Attributes:
        kernels: by `"self"` or `"cross"`, functions of query, key, value and mask that are tried before PyTorch's; they
            return None for what they do not take.
    """

    kernels: Mapping[str, Callable[..., torch.Tensor | None]] = {}

    accepts_context_kv = True
    # Where diffusers looks whether a processor can have a backend.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | ContextKV | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        """Attend. `hidden_states`: (batch, tokens, channels) or (batch, channels, height, width); returns its shape."""
        cached = isinstance(encoder_hidden_states, ContextKV)
        fused = encoder_hidden_states is None and getattr(attn, "to_qkv", None) is not None
        separate = self._attention_backend is not None and not attn.norm_cross
        if not (cached or fused or separate) or attn.spatial_norm is not None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )

        residual = hidden_states
        spatial = hidden_states.shape if hidden_states.ndim == 4 else None
        if spatial is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        padding_mask = None
        if isinstance(encoder_hidden_states, ContextKV):
            query = attn.to_q(hidden_states)
            key, value, padding_mask = encoder_hidden_states
        elif fused:
            query, key, value = attn.project(hidden_states)
        else:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        if attention_mask is None:
            attention_mask = padding_mask
        else:
            key, value = (x[:, :, : attention_mask.shape[-1]] for x in (key, value))
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], key.shape[0])
            attention_mask = attention_mask.unflatten(0, (-1, attn.heads))
        kernel = self.kernels.get("self" if fused else "cross")
        hidden_states = self._attend(kernel, query, key, value, attention_mask).flatten(2)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)

        if spatial is not None:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, spatial[2:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        if attn.rescale_output_factor != 1:
            hidden_states = hidden_states / attn.rescale_output_factor
        return hidden_states

    def _attend(self, kernel: Callable | None, query, key, value, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of (batch, heads, tokens, head_dim), heads behind tokens in the result."""
        if self._attention_backend is None:
            attended = None if kernel is None else kernel(query, key, value, mask)
            if attended is not None:
                return attended.transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
