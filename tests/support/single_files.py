"""Writes a pipeline as one file in Stability AI's original layout: the inverse of what `from_single_file` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_SAMPLERS = {"downsamplers": "downsample", "upsamplers": "upsample"}
_OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def write_single_file(pipe: StableDiffusionXLPipeline, path: Path) -> Path:
    """Save UNet, VAE and text encoders; returns the path."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in _unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in _vae(pipe.vae).items()}
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()}
    tensors |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in text.items()}
    open_clip = _open_clip(pipe.text_encoder_2.state_dict())
    tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def _unet(unet) -> dict[str, torch.Tensor]:
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    names = {**tables["layers"], **tables["addition_embed_type"]}
    state = unet.state_dict()
    result = {names[key]: state.pop(key) for key in list(state) if key in names}
    per_block = unet.config.layers_per_block + 1
    for key, value in state.items():
        level, _, rest = key.partition("_blocks." if not key.startswith("mid") else "_block.")
        if level == "mid":
            kind, index, tail = rest.split(".", 2)
            place = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
            result[f"{place}.{_rename(tail, _RESNET) if kind == 'resnets' else tail}"] = value
            continue
        block, kind, index, tail = rest.split(".", 3)
        block, index = int(block), int(index)
        if kind == "downsamplers":
            result[f"input_blocks.{(block + 1) * per_block}.0.op.{tail.removeprefix('conv.')}"] = value
        elif kind == "upsamplers":
            has_attention = hasattr(unet.up_blocks[block], "attentions")
            result[f"output_blocks.{(block + 1) * per_block - 1}.{1 + has_attention}.{tail}"] = value
        else:
            number = block * per_block + index + (level == "down")
            place = f"{'input' if level == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
            result[f"{place}.{_rename(tail, _RESNET) if kind == 'resnets' else tail}"] = value
    return result


def _vae(vae) -> dict[str, torch.Tensor]:
    names = DIFFUSERS_TO_LDM_MAPPING["vae"]
    last = len(vae.config.up_block_types) - 1
    result = {}
    for key, value in vae.state_dict().items():
        if key in names:
            result[names[key]] = value
            continue
        side, group, rest = key.split(".", 2)
        if group == "mid_block":
            kind, index, tail = rest.split(".", 2)
            if kind == "attentions":
                value = value[:, :, None, None] if value.ndim == 2 else value
                result[f"{side}.mid.attn_1.{_rename(tail, _VAE_ATTENTION)}"] = value
            else:
                result[f"{side}.mid.block_{int(index) + 1}.{tail.replace('conv_shortcut', 'nin_shortcut')}"] = value
            continue
        block, kind, index, tail = rest.split(".", 3)
        place = f"{side}.down.{block}" if group == "down_blocks" else f"{side}.up.{last - int(block)}"
        if kind == "resnets":
            result[f"{place}.block.{index}.{tail.replace('conv_shortcut', 'nin_shortcut')}"] = value
        else:
            result[f"{place}.{_SAMPLERS[kind]}.{tail}"] = value
    return result


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    result = {}
    for key, value in state.items():
        if key in names:
            result[names[key]] = value.T if key == "text_projection.weight" else value
        elif ".q_proj." in key:
            joined = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            place, kind = _rename(key, _OPEN_CLIP).split(".q_proj.")
            result[f"{place}.in_proj_{kind}"] = joined
        elif ".k_proj." not in key and ".v_proj." not in key:
            result[_rename(key, _OPEN_CLIP)] = value
    return result


def _rename(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key
