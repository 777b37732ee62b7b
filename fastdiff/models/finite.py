"""Notices latents and pictures that are NaN or infinite, which stock turns into black pictures without a word.

The check is reduced to one number on the device, whose copy to the host is queued before that of the picture: once the
picture is on the host, so is the number, and reading it waits for nothing.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

import torch
from diffusers.image_processor import VaeImageProcessor

_current: ContextVar[FiniteCheck | None] = ContextVar("fastdiff_finite_check", default=None)

_CAUSES = {
    "latents": (
        "The latents became NaN or infinite while denoising. Likely causes: the UNet overflows in float16 (load with "
        "torch_dtype=torch.bfloat16), a broken or too strongly scaled LoRA{adapters}, or prompt embeddings, latents or "
        "a guidance scale that were not finite to begin with."
    ),
    "picture": (
        "The VAE decoded finite latents to NaN or infinity. Likely cause: it overflows in float16. Use "
        "torch_dtype=torch.bfloat16, or pipe.vae.register_to_config(force_upcast=True), or a VAE made for float16."
    ),
}


class NonFiniteError(FloatingPointError):
    """A call ended in latents or pictures that are NaN or infinite."""


class FiniteCheck:
    """Collects, over one call, whether what went through was finite."""

    def __init__(self):
        self._flags: dict[str, torch.Tensor] = {}

    def __enter__(self) -> FiniteCheck:
        self._token: Token = _current.set(self)
        return self

    def __exit__(self, *exception) -> None:
        _current.reset(self._token)

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Queue the check of a tensor, which may be on a device; does not wait."""
        # True until the copy has arrived; pinned, or the copy would wait.
        arrived = torch.ones((), dtype=torch.bool, pin_memory=tensor.device.type == "cuda")
        self._flags[name] = arrived.copy_(torch.isfinite(tensor).all(), non_blocking=True)

    @property
    def has_notes(self) -> bool:
        """Whether anything was checked."""
        return bool(self._flags)

    def explanation(self, adapters: list[str]) -> str | None:
        """What was not finite and the likely cause, or None, also while that is not known.

        Known for sure once the result is on the host.

        Args:
            adapters: names of the adapters that are active.
        """
        for name in ("latents", "picture"):
            if name in self._flags and not self._flags[name]:
                active = f" ({', '.join(adapters)} active)" if adapters else ""
                # Of a decoder that the user compiled nobody knows what went into it.
                causes = [name] if "latents" in self._flags else ["latents", "picture"]
                return " Or: ".join(_CAUSES[cause] for cause in causes).format(adapters=active)
        return None


class CheckedImageProcessor(VaeImageProcessor):
    """Upstream's image processor, which notes whether decoded pictures are finite."""

    def postprocess(self, image: torch.Tensor, *args, **kwargs):
        """As upstream."""
        note_finite("picture", image)
        return super().postprocess(image, *args, **kwargs)


def note_finite(name: str, tensor: torch.Tensor) -> None:
    """Have the current call check a tensor, `"latents"` or `"picture"`; outside of a fast pipeline, nothing."""
    check = _current.get()
    if check is not None:
        check.note(name, tensor)
