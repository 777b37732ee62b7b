"""Quantized models on disk: one safetensors file whose metadata names the scheme, and the configuration beside it.

Stock diffusers finds no file of its own in such a folder and says so: it could not compute these weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from .geglu import convert_geglu
from .int8 import Int8, Int8Conv2d, Int8Gate, Int8Linear, convert_feed_forward
from .int8_units import check_int8_units
from .record import Quantized
from .torchao_form import TorchaoLinear

FILE = "fastdiff_quantized.safetensors"
_FORMAT, _VERSION = "fastdiff-quantized", "1"
_CLASSES = ("UNet2DConditionModel", "ControlNetModel")


def save_quantized(model: ModelMixin, save_directory: str | os.PathLike, **ignored) -> None:
    """Write a quantized model in its quantized form.

    Args:
        model: a fast UNet or ControlNet with `model.quantized`.
        save_directory: made if need be; gets `config.json` and `fastdiff_quantized.safetensors`.
        ignored: what `ModelMixin.save_pretrained` takes beside.
    """
    Path(save_directory).mkdir(parents=True, exist_ok=True)
    model.save_config(save_directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        # Each module's own tensors: the hooks that give projections their stock names would split quantized ones.
        prefix = f"{name}." if name else ""
        if isinstance(module, Int8 | TorchaoLinear):
            module.save_held(tensors, prefix)
        else:
            module._save_to_state_dict(tensors, prefix, False)
    tensors, metadata = flatten_tensor_state_dict({key: value.detach() for key, value in tensors.items()})
    metadata |= {"format": _FORMAT, "version": _VERSION, "record": json.dumps(dataclasses.asdict(model.quantized))}
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(save_directory) / FILE, metadata)


def quantized_scheme_of(folder: str | os.PathLike) -> str | None:
    """The scheme of the quantized model in a folder, or None if there is none.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    path = Path(folder) / FILE
    return _read_record(path).scheme if path.is_file() else None


def load_quantized(
    folder: str | os.PathLike, requested: str, convert: Callable[[ModelMixin], ModelMixin]
) -> ModelMixin:
    """Load a model that `save_quantized` wrote, on the CPU, without ever holding its plain weights.

    Args:
        folder: with `config.json` and `fastdiff_quantized.safetensors`.
        requested: `FastConfig.quantization`.
        convert: makes a stock model the fast one.

    Raises:
        ValueError: the file is damaged, of another scheme than requested, or of one that this CPU cannot compute.
    """
    path = Path(folder) / FILE
    record = _read_record(path)
    if requested not in ("auto", record.scheme):
        raise ValueError(
            f"quantization={requested!r}, but {str(path)!r} is quantized with {record.scheme!r} and holds no plain "
            f"weights. Use quantization='auto' or {record.scheme!r}, or load the checkpoint that it was made from."
        )
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if config.get("_class_name") not in _CLASSES:
        raise ValueError(f"{str(folder)!r} holds a {config.get('_class_name')}, not one of {', '.join(_CLASSES)}.")
    try:
        with safe_open(path, framework="pt") as file:
            flat = {key: file.get_tensor(key) for key in file.keys()}
            tensors, rest = unflatten_tensor_state_dict(flat, file.metadata())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if any(key.endswith(".weight_int8") for key in tensors):
        check_int8_units()
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    model = convert(model.eval().requires_grad_(False))
    try:
        _fill(model, {**tensors, **rest}, record.scheme)
    except (KeyError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    model.quantized = record
    return model


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], scheme: str) -> None:
    """Give a model on the meta device its tensors, and its layers the kinds that they were saved with."""
    fused = {key.rsplit(".to_qkv.", 1)[0] for key in tensors if ".to_qkv." in key}
    for name in fused:
        attention = model.get_submodule(name)
        parts = [getattr(attention, part) for part in ("to_q", "to_k", "to_v")]
        width = sum(part.out_features for part in parts)
        attention.to_qkv = nn.Linear(parts[0].in_features, width, bias=parts[0].bias is not None, device="meta")
        del attention.to_q, attention.to_k, attention.to_v
    gates = convert_geglu(model)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if f"{prefix}weight_int8" in tensors:
            weight, scale = (tensors.pop(prefix + key) for key in ("weight_int8", "weight_scale"))
            _check_shape(prefix, weight, module.weight)
            kind = Int8Conv2d if isinstance(module, nn.Conv2d) else Int8Gate if id(module) in gates else Int8Linear
            kind.restore(module, weight, scale)
        elif type(tensors.get(f"{prefix}weight")) not in (torch.Tensor, type(None)):
            _check_shape(prefix, tensors[prefix + "weight"], module.weight)
            TorchaoLinear.restore(module, tensors.pop(prefix + "weight"), scheme)
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                value = tensors.pop(prefix + key)
                _check_shape(prefix + key, value, parameter)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    if tensors:
        raise ValueError(f"unknown tensors, such as {next(iter(tensors))!r}")
    if any(isinstance(module, Int8) for module in model.modules()):
        convert_feed_forward(model)


def _check_shape(name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
    if value.shape != expected.shape:
        raise ValueError(f"{name} is of shape {tuple(value.shape)}, not {tuple(expected.shape)}")


def _read_record(path: Path) -> Quantized:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"{str(path)!r} is of format {metadata.get('format')!r} {metadata.get('version')!r}; this version of "
            f"fastdiff reads {_FORMAT!r} {_VERSION!r}. Quantize the checkpoint again."
        )
    return Quantized(**json.loads(metadata["record"]))


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged or incomplete ({error}). Save the quantized pipeline again.")
