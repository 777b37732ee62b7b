"""The way of pictures from the device to PIL: whole numbers already there, one copy, one wait."""

from __future__ import annotations

import torch
from PIL import Image

from ..models.finite import CheckedImageProcessor


class FastImageProcessor(CheckedImageProcessor):
    """Upstream's image processor; on CUDA it makes 8-bit numbers before it copies, half or a quarter of the bytes.

    Pictures are those of upstream, bit for bit.
    """

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """As upstream."""
        # Only what upstream clamps to [0, 1] has one meaning in 8 bits; grey pictures are rare.
        clamped = self.config.do_normalize if do_denormalize is None else all(do_denormalize)
        if output_type != "pil" or not clamped or image.device.type != "cuda" or image.shape[1] != 3:
            return super().postprocess(image, output_type, do_denormalize)
        pixels = to_pixels(super().postprocess(image, "pt", do_denormalize))
        on_host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        on_host.copy_(pixels, non_blocking=True)
        torch.cuda.current_stream(image.device).synchronize()
        return [Image.fromarray(picture) for picture in on_host.numpy()]


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Make 8-bit numbers, (batch, height, width, channels), as upstream does on the host.

    Args:
        images: (batch, channels, height, width) in [0, 1], of any floating-point dtype.
    """
    # In float32, as upstream's arrays are; both round halves to even.
    return images.permute(0, 2, 3, 1).float().mul(255).round().to(torch.uint8).contiguous()
