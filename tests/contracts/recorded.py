"""Runs a tiny pipeline as if on a GPU, and says what its loop waited for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from legs import draw

sys.path.append(str(Path(__file__).parents[1]))
from support.sync_recorder import SyncRecorder  # noqa: E402


def place(pipe) -> None:
    """Put the models of a pipeline on the device, once fastdiff's plan is applied."""
    if hasattr(pipe, "explain"):
        pipe.explain()
    SyncRecorder.place(*(model for model in pipe.components.values() if isinstance(model, torch.nn.Module)))


def record(pipe, **options) -> tuple[SyncRecorder, torch.Tensor]:
    """Draw with noise from the default generator; the recorder afterwards, and the picture as an array."""
    torch.manual_seed(0)
    with SyncRecorder() as recorder, recorder.watch(pipe):
        picture = draw(pipe, **{"generator": None, "output_type": "np", **options})
    return recorder, picture


def places(events) -> dict[str, int]:
    """How many events at which place, "file.py:line"."""
    return dict(Counter(event.where.rpartition("/")[2] for event in events))
