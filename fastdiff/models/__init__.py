"""The stock models made fast, over the same weights: UNet, VAE, ControlNet and what they share.

May import no other room: all of them stand on it.
"""

from .attention import FastAttention, apply_fusion, convert_attention
from .context import ContextKV
from .controlnet import FastControlNetModel, convert_controlnet, fast_controlnets
from .finite import FiniteCheck, NonFiniteError
from .memory_format import apply_channels_last
from .offload import inner_offloading
from .processor import FusedQKVAttnProcessor
from .unet import FastUNet2DConditionModel
from .vae import FastAutoencoderKL

__all__ = [
    "ContextKV",
    "FastAttention",
    "FastAutoencoderKL",
    "FastControlNetModel",
    "FastUNet2DConditionModel",
    "FiniteCheck",
    "FusedQKVAttnProcessor",
    "NonFiniteError",
    "apply_channels_last",
    "apply_fusion",
    "convert_attention",
    "convert_controlnet",
    "fast_controlnets",
    "inner_offloading",
]
