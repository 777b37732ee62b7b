"""Settings of the compiler that several threads have overridden at once."""

from __future__ import annotations

import threading

import pytest
import torch

from fastdiff.compiler import settings
from fastdiff.compiler.settings import CompilerSettings


class _OldConfig:
    """As torch's before 2.12: overrides hold for the process, and a patch can be entered once."""

    recompile_limit = 8

    def patch(self, **changes):
        config = self

        class Patch:
            prior: dict = {}

            def __enter__(self):
                assert not self.prior, "prior should be empty when entering ConfigPatch"
                self.prior = {name: getattr(config, name) for name in changes}
                vars(config).update(changes)

            def __exit__(self, *exception):
                vars(config).update(self.prior)
                self.prior = {}

        return Patch()


def inside_at_once(overrides: CompilerSettings, config, threads: int = 4) -> list[int]:
    """What threads see that are inside at the same time, if they may be."""
    barrier, seen = threading.Barrier(threads), []

    def enter() -> None:
        with overrides:
            try:
                barrier.wait(timeout=0.5)
            except threading.BrokenBarrierError:
                pass
            seen.append(config.recompile_limit)

    running = [threading.Thread(target=enter) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_threads_enter_at_once(monkeypatch, shared):
    config = _OldConfig() if shared else torch._dynamo.config
    monkeypatch.setattr(settings, "overrides_are_shared", lambda: shared)
    before = config.recompile_limit
    assert inside_at_once(CompilerSettings(config, recompile_limit=77), config) == [77] * 4
    assert config.recompile_limit == before


def test_nested_and_after_an_error():
    overrides, before = CompilerSettings(torch._dynamo.config, recompile_limit=77), torch._dynamo.config.recompile_limit
    with pytest.raises(ZeroDivisionError), overrides, overrides:
        assert torch._dynamo.config.recompile_limit == 77
        1 / 0  # noqa: B018
    assert torch._dynamo.config.recompile_limit == before


