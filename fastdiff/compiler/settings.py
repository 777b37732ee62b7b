"""Settings of torch's compiler for what runs inside of a block of code, and for nothing else."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

_turn = threading.RLock()


class CompilerSettings:
    """Overrides, entered by any number of threads at once.

    Each thread has patches of its own, made once, as each keeps a context variable for good: before torch 2.12 one
    that is entered twice raises. There overrides hold for all threads, which then take turns.

    Args:
        config: such as `torch._dynamo.config`.
        changes: the settings.
    """

    def __init__(self, config: Any, **changes: Any):
        self._config, self._changes, self._local = config, changes, threading.local()

    def __enter__(self) -> None:
        if overrides_are_shared():
            _turn.acquire()
        state = self._local.__dict__
        depth = state.setdefault("depth", 0)
        patches = state.setdefault("patches", [])
        if len(patches) == depth:
            patches.append(self._config.patch(**self._changes))
        patches[depth].__enter__()
        state["depth"] = depth + 1

    def __exit__(self, *exception) -> None:
        state = self._local.__dict__
        state["depth"] -= 1
        state["patches"][state["depth"]].__exit__(*exception)
        if overrides_are_shared():
            _turn.release()


@functools.cache
def overrides_are_shared() -> bool:
    """Whether a thread sees what another one has overridden, as before torch 2.12."""
    usual, seen = torch._dynamo.config.recompile_limit, []
    with torch._dynamo.config.patch(recompile_limit=usual + 1):
        thread = threading.Thread(target=lambda: seen.append(torch._dynamo.config.recompile_limit))
        thread.start()
        thread.join()
    return seen[0] != usual
