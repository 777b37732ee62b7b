"""Shows what is being compiled: one bar for all models of a call, in the style of the pipeline's own bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

from tqdm.auto import tqdm

_current: ContextVar[CompileProgress | None] = ContextVar("fastdiff_compile_progress", default=None)

# A bar that is done before anybody can read it is left out: graphs that exist already, or come from a cache.
_DELAY_S = 0.5


class CompileProgress:
    """Follows the compiling that happens while it is entered; nested in another one, it leaves the bar to that.

    Args:
        bar_config: what `pipe.set_progress_bar_config` was given; `disable=True` shows nothing.
    """

    def __init__(self, bar_config: dict):
        self._config = bar_config
        self._bar: tqdm | None = None
        self._token: Token | None = None
        self._started = 0.0

    def __enter__(self) -> CompileProgress:
        if _current.get() is None:
            self._token = _current.set(self)
        return self

    def __exit__(self, *exception) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def expect(self, graphs: int) -> None:
        """Announce that a model is about to run which has so many graphs to make."""
        if graphs == 0:
            return
        if self._bar is None:
            ours = {"desc": "Compiling", "unit": "graph", "leave": False, "delay": _DELAY_S, "total": 0}
            self._bar, self._started = tqdm(**{**self._config, **ours}), time.monotonic()
        self._bar.total += graphs

    @contextmanager
    def compiling(self, label: str) -> Iterator[None]:
        """Name the region whose graph is being made."""
        if self._bar is not None:
            self._bar.set_postfix_str(label, refresh=time.monotonic() - self._started > _DELAY_S)
        yield
        if self._bar is not None:
            self._bar.update()


def current_progress() -> CompileProgress | None:
    """The progress of the running call, or None outside of one (a direct call of the UNet)."""
    return _current.get()
