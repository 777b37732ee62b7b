"""Checks on a checkpoint before anything long begins, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ..checkpoint import check_folder, check_kind, is_model_id
from ..config import FastConfig

# Instructions of x86 that multiply bfloat16, or give it to those that multiply float32.
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


def check_checkpoint(pipeline_class: type[DiffusionPipeline], path: str | os.PathLike, kwargs: dict) -> None:
    """Refuse what is no SDXL checkpoint in safetensors; sets `use_safetensors` in `kwargs` unless it is given.

    Args:
        path: a local directory or a model id.
        kwargs: the arguments of `from_pretrained`.

    Raises:
        ValueError: with the reason and what to do.
    """
    any_format, variant = kwargs.get("use_safetensors") is False, kwargs.get("variant")
    if not any_format:
        kwargs["use_safetensors"] = True
    if not is_model_id(path):
        # Of a variant that is not there diffusers speaks.
        is_missing = variant is not None and not any(Path(path).glob(f"*/*.{variant}*"))
        check_folder(path, kwargs, any_format or is_missing)
        return
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    try:
        index = pipeline_class.load_config(path, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be found, here or on the hub ({' '.join(str(error).split())[:200]}): pass a "
            "directory written by save_pretrained() or a model id of the hub."
        ) from error
    check_kind(path, index)


def loading_dtype(config: FastConfig) -> torch.dtype:
    """The dtype to load weights in when the user names none.

    Stock's own default is float32. It is named here because transformers keeps the dtype that is stored: a float16
    checkpoint would otherwise come out half float16 (text encoders), half float32 (UNet, VAE), and not run.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if config.dtype == "stock":
        return torch.float32
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = _cpu_computes_bfloat16()
    return torch.bfloat16 if native else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16. oneDNN also takes it where AVX512 has to imitate it, which is slower
    than float32."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") == "x86_64" and not any(map(capabilities.get, _BFLOAT16_UNITS)):
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_single_file(path: str | os.PathLike) -> None:
    """Refuse a single-file checkpoint that is missing, not safetensors, or not SDXL.

    Args:
        path: a local file; of a link only the ending is looked at.

    Raises:
        ValueError: with the reason and what to do.
    """
    shown = repr(str(path))
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"{shown} is not a .safetensors file. Other formats can run code while loading; convert the checkpoint."
        )
    if str(path).startswith(("https://", "huggingface.co/", "hf.co/")):
        return
    if not Path(path).is_file():
        raise ValueError(f"{shown} cannot be found: pass a local file or a link to a file of the hub.")
    with safe_open(path, framework="pt") as file:
        names = file.keys()
    if not any(name.startswith("conditioner.embedders.") for name in names):
        raise ValueError(
            f"{shown} is no whole SDXL checkpoint in the original layout: it has no 'conditioner.embedders' weights. "
            "For a checkpoint in the diffusers layout use from_pretrained(); to replace the UNet alone, load it with "
            "UNet2DConditionModel.from_single_file() and pass it as unet=."
        )
