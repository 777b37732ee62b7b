"""What is asked of a machine: which of several ways to compute one thing is right and fast here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What every option is checked with: what stands for activations; some rows, or all, of zeros; large numbers; one row.
KINDS = ("ordinary", "zero rows", "zeros", "large", "one row")


@dataclass(frozen=True)
class Option:
    """One way to compute something.

    Attributes:
        name: how results and the file call it.
        make: prepares it, once; what it returns takes the question's inputs and returns one tensor.
        lossless: whether results equal the first option's within rounding.
    """

    name: str
    make: Callable[[], Callable[..., torch.Tensor]]
    lossless: bool = True


@dataclass(frozen=True)
class Question:
    """Which option to take: of layers' forms, attention backends, a compiler's options, kernels.

    Attributes:
        key: says what is computed, in words: kind, sizes, dtype. Whoever has the same key has the same answer.
        options: the first is the plain one, which the others are compared with.
        inputs: makes the arguments, given a kind of `KINDS` and the share, over 0 and up to 1, of the size of the
            model's own that they are to have.
        tolerance: the largest |difference| / |result| of a lossless option.
        lossy_tolerance: that of the others.
    """

    key: str
    options: tuple[Option, ...]
    inputs: Callable[[str, float], tuple[Any, ...]]
    tolerance: float = 0.02
    lossy_tolerance: float = 0.05


@dataclass(frozen=True)
class Outcome:
    """What was found out about one option.

    Attributes:
        ms: milliseconds of the shortest call; None if it was not timed.
        ratio: how many times as fast as the plain option: at least, by the shortest times, at most.
        error: the largest |difference| / |result| of all checks.
        refused: why it cannot be taken at all, or None.
        lossless: as its option says.
    """

    ms: float | None = None
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)
    error: float = 0.0
    refused: str | None = None
    lossless: bool = True
