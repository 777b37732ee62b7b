"""Full-size SDXL with random weights: the real shapes and FLOPs, no download."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNET_CONFIG = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

VAE_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}

_TEXT_1 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}
_TEXT_2 = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
    "projection_dim": 1280, "hidden_act": "gelu",
}
_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def random_unet(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> UNet2DConditionModel:
    """SDXL's 2.57 B-parameter UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIG)
    return fill(unet, dtype, device, seed)


def random_vae(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 1) -> AutoencoderKL:
    """SDXL's VAE."""
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_CONFIG)
    return fill(vae, dtype, device, seed)


def random_pipeline(
    tokenizer: CLIPTokenizer, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> StableDiffusionXLPipeline:
    """A stock pipeline of full size; `tokenizer` may be any CLIP tokenizer of up to 49,408 tokens."""
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**_TEXT_1))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT_2))
    return StableDiffusionXLPipeline(
        vae=random_vae(dtype, device),
        text_encoder=fill(text_encoder, dtype, device, 2),
        text_encoder_2=fill(text_encoder_2, dtype, device, 3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=random_unet(dtype, device),
        scheduler=EulerDiscreteScheduler(**_SCHEDULER),
        add_watermarker=False,
    )


@torch.no_grad()
def fill(model: nn.Module, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    """Give a model on the meta device weights: normal, of a scale that keeps activations finite; norms at identity."""
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or parameter.ndim < 2:
                parameter.fill_(1.0 if name == "weight" else 0.0)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return model
