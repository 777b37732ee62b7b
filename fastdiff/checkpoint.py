"""What a checkpoint's name and files say before any library reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Container
from pathlib import Path

from . import EMBEDDED_CHECKPOINT

EMBEDDED = "embedded"
"""The name that stands for the checkpoint in the package."""

_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def find_checkpoint(name: str | os.PathLike) -> str | os.PathLike:
    """The directory or model id that a user means: `"embedded"` is the checkpoint in the package."""
    return EMBEDDED_CHECKPOINT if name == EMBEDDED and not Path(name).exists() else name


def is_model_id(name: str | os.PathLike) -> bool:
    """Whether this is no directory here and may be a model of the hub: `NAME` or `OWNER/NAME`."""
    text = str(name)
    return not Path(name).exists() and text.count("/") <= 1 and text[:1] not in ("", "/", ".", "~", "\\")


def check_folder(folder: str | os.PathLike, given: Container[str] = (), any_format: bool = False) -> None:
    """Refuse a directory that is no SDXL checkpoint in safetensors.

    Args:
        given: components that come from elsewhere, whose files need not be there.
        any_format: whether weights may be in other files than safetensors.

    Raises:
        ValueError: with the reason and what to do.
    """
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        kind = "cannot be found"
        if Path(folder).exists():
            kind = "is a directory without model_index.json" if Path(folder).is_dir() else "is no directory"
        raise ValueError(
            f"{str(folder)!r} {kind}: pass a directory written by save_pretrained() or a model id of the hub."
        ) from error
    check_kind(folder, index)
    for component in _WITH_WEIGHTS:
        if component in given or index.get(component, [None])[0] is None:
            continue
        files = Path(folder) / component
        if not files.is_dir():
            raise ValueError(f"{str(folder)!r} has no folder {component!r}: the checkpoint is incomplete.")
        if not any_format and not any(files.glob("*.safetensors")):
            raise ValueError(
                f"{str(files)!r} holds no safetensors. Other formats can run code while loading; convert them with "
                "save_pretrained(), or pass use_safetensors=False if you trust the file."
            )


def check_kind(name: str | os.PathLike, index: dict) -> None:
    """Refuse what another kind of pipeline has written; `index` is its `model_index.json`."""
    kind = index.get("_class_name", "")
    if "StableDiffusionXL" not in kind:
        raise ValueError(f"{str(name)!r} is a {kind or 'nameless'} checkpoint; fastdiff runs Stable Diffusion XL only.")
