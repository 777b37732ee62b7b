"""A pytest plugin: upstream's own tests with the fast classes in place of the stock ones.

In a clone of diffusers at the release that is installed, with its test requirements (parameterized, requests-mock):

    PYTHONPATH=<this repository>:<this repository>/tests python -m pytest -p support.upstream_classes \
        tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py ...

Without `-p` the same command runs the stock classes, for comparison. Nothing of upstream's tests is kept here.
"""

from __future__ import annotations

from pathlib import Path

import diffusers

import fastdiff
from fastdiff import FastConfig
from fastdiff.pipelines import checkpoints

_NAMES = [name.removeprefix("Fast") for name in fastdiff.__all__ if hasattr(diffusers, name.removeprefix("Fast"))]


def pytest_configure() -> None:
    """Before anything is collected, and so before tests import their classes."""
    resolve = FastConfig.resolve
    # Upstream compares with what it computes in float32; "exact" is what claims to be equal.
    FastConfig.resolve = lambda fast: resolve("exact" if fast is None else fast)
    check = checkpoints.check_checkpoint

    def trusting(pipeline_class, path, kwargs):
        # Many of upstream's tests save pickles on the way, which fastdiff refuses unless it is told to trust them.
        if not list(Path(path).glob("*/*.bin")):
            check(pipeline_class, path, kwargs)

    checkpoints.check_checkpoint = trusting
    for name in _NAMES:
        setattr(diffusers, name, getattr(fastdiff, f"Fast{name}"))
