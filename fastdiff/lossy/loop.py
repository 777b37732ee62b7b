"""Where the denoising loop of the current call is, for the options that do not do the same work in every step."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from ..config import FastConfig

_current: ContextVar[DenoisingLoop | None] = ContextVar("fastdiff_denoising_loop", default=None)


class DenoisingLoop:
    """Takes the place of the progress bar that upstream's loop enters and updates after each step.

    Each call has a loop of its own, so that calls in several threads over one UNet do not see each other's steps.

    Args:
        pipe: the pipeline of the call.
        bar: the progress bar to drive.
        total: number of steps.
    """

    def __init__(self, pipe, bar, total: int):
        self.done = 0
        self.memory: dict[Any, Any] = {}
        self._pipe, self._bar, self._total = pipe, bar, total

    @property
    def config(self) -> FastConfig:
        """The configuration of the call's pipeline; others over the same UNet may have another."""
        return self._pipe.active_config

    @property
    def fraction(self) -> float:
        """The part of the call's steps that is done, from 0.0 in the first step to less than 1.0 in the last."""
        return self.done / self._total

    @property
    def is_guided(self) -> bool:
        """Whether latents are doubled for classifier-free guidance in this step."""
        return self._pipe.do_classifier_free_guidance

    def update(self, n: int = 1) -> None:
        """Upstream's loop has done `n` steps."""
        self.done += n
        self._bar.update(n)

    def __enter__(self) -> DenoisingLoop:
        self._token = _current.set(self)
        self._bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.__exit__(*exception)
        self.memory.clear()
        _current.reset(self._token)


def current_loop() -> DenoisingLoop | None:
    """The denoising loop that this code runs in, or None outside of one (the VAE, a direct call of the UNet)."""
    return _current.get()
