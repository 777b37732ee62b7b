"""Questions answered from the file, or else by measuring."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .machine import machine_of
from .measure import measure
from .question import Question
from .record import Answers, Record, default_path

# For all questions of a model together, where nothing else is said.
_SECONDS = 6.0
# A bar that is done before anybody can read it is left out.
_DELAY_S = 0.5


class Tuner:
    """Answers questions for one device; what it measured is remembered.

    Args:
        tuning: of `FastConfig`: `"auto"`, or the path of a file.
        device: that the questions' options run on.
        facts: what else the answers depend on, such as whether there is a compiler.
    """

    def __init__(self, tuning: str, device: torch.device, facts: dict[str, str] | None = None):
        path = default_path() if tuning == "auto" else Path(tuning).expanduser()
        self.record = Record(path, {**machine_of(device), **(facts or {})})
        self.answers: Answers = self.record.load()

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all that was measured: processes with the same one choose the same."""
        return self.record.digest(self.answers)

    def ask(
        self,
        keys: Iterable[str],
        questions: Callable[[set[str]], Iterable[Question]],
        bar: dict | None = None,
        again: bool = False,
        seconds: float = _SECONDS,
    ) -> Answers:
        """The answers to all keys.

        Args:
            keys: of the questions.
            questions: makes the questions of those keys that were never answered here; not called if there are none.
            bar: arguments of the progress bar.
            again: measure all of them now.
            seconds: that measuring may take, roughly.
        """
        keys = list(dict.fromkeys(keys))
        missing = {key for key in keys if again or key not in self.answers}
        if missing:
            found = _measure_all(list(questions(missing)), bar or {}, seconds)
            self.answers = {**self.answers, **self.record.add(found, replace=again)}
        return {key: self.answers[key] for key in keys if key in self.answers}


def _measure_all(questions: list[Question], bar: dict, seconds: float) -> Answers:
    ends, found = time.monotonic() + seconds, {}
    ours = {"desc": "Tuning for this machine", "unit": "shape", "leave": False, "delay": _DELAY_S}
    for index, question in enumerate(tqdm(questions, **{**bar, **ours})):
        share = max(0.0, ends - time.monotonic()) / (len(questions) - index)
        try:
            found[question.key] = measure(question, share)
        except Exception as error:  # of the plain option: whoever draws the picture will raise it, too
            warnings.warn(f"{question.key}: nothing could be measured ({error!r}).", stacklevel=2)
    return found


@functools.lru_cache(maxsize=8)
def tuner_of(tuning: str, device: torch.device, facts: tuple[tuple[str, str], ...] = ()) -> Tuner:
    """The tuner of this process: where its file cannot be written, it remembers as long as the process lives."""
    return Tuner(tuning, device, dict(facts))
