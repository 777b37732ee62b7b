"""Fixtures: tiny real SDXL pipelines and the comparisons that most tests make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Before torch is imported: small products gain nothing from threads, and pictures of this process are compared bit for
# bit with those of processes that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionXLPipeline  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from support.embedded import load_fast, load_stock  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from fastdiff import FastStableDiffusionXLPipeline  # noqa: E402

diffusers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def stock() -> StableDiffusionXLPipeline:
    """A stock pipeline for reference images; tests leave it as it is."""
    return load_stock()


@pytest.fixture(scope="module")
def exact() -> FastStableDiffusionXLPipeline:
    """A fast pipeline, preset "exact"; tests leave it as it is."""
    return load_fast("exact")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and counted from here on."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Compare latents or images with the project's tolerance for lossless steps in float32."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max().item() < tolerance

    return check
