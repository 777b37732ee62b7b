"""Real LoRA files for the embedded checkpoint, with weights large enough to change the picture."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "v_proj")


def write_lora(
    pipe: StableDiffusionXLPipeline,
    folder: Path,
    seed: int,
    rank: int = 4,
    text: bool = False,
    targets: tuple[str, ...] = UNET_TARGETS,
) -> Path:
    """Save a random LoRA for `pipe`, which is changed on the way; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"unet_lora_layers": _adapter(pipe.unet, targets, seed, rank)}
    if text:
        layers["text_encoder_lora_layers"] = _adapter(pipe.text_encoder, TEXT_TARGETS, seed + 1, rank)
        layers["text_encoder_2_lora_layers"] = _adapter(pipe.text_encoder_2, TEXT_TARGETS, seed + 2, rank)
    StableDiffusionXLPipeline.save_lora_weights(folder, weight_name="lora.safetensors", **layers)
    return folder / "lora.safetensors"


@torch.no_grad()
def _adapter(model: torch.nn.Module, targets: tuple[str, ...], seed: int, rank: int) -> dict[str, torch.Tensor]:
    name = f"made_{seed}"
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            parameter.normal_(std=0.15, generator=generator)
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name=name))
