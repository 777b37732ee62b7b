"""Whether a picture can fit in a device's memory at all, asked before anything long begins."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch


def check_memory(
    vae: Mapping, size: tuple[int, int], pictures: int, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Refuse pictures whose decoding alone takes more memory than the device has.

    Counted is the least that the VAE's last level needs: what a layer reads and what it writes, with the channels that
    come up from the level below. The weights come on top.

    Args:
        vae: configuration of the VAE.
        size: (width, height) in pixels.
        pictures: decoded at once.
        dtype: of the VAE's activations.

    Raises:
        ValueError: with both figures.
    """
    channels = vae["block_out_channels"]
    width, height = size
    needed = 2 * channels[min(1, len(channels) - 1)] * width * height * pictures * dtype.itemsize
    held = _memory(torch.device(device))
    if held is not None and needed > held:
        each = f"{pictures} pictures of {width}x{height}" if pictures > 1 else f"a picture of {width}x{height}"
        raise ValueError(
            f"{each} needs {needed / 2**30:,.0f} GiB or more to decode, and {device} has {held / 2**30:,.0f} GiB: "
            "choose a smaller size, or fewer pictures at a time"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
