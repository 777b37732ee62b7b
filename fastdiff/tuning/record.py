"""The file that remembers: what each machine has answered, as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..cache import cache_folder
from .question import Outcome

_FORMAT, _VERSION = "fastdiff-tuning", 2

Answers = dict[str, dict[str, Outcome]]


def default_path() -> Path:
    """In the user's cache folder."""
    return cache_folder() / "tuning.json"


class Record:
    """Answers of one machine in a file that other machines and processes may use, too.

    Nothing here raises over a file: one that is damaged, foreign or cannot be written costs a warning.

    Args:
        path: need not exist.
        machine: see `machine_of`.
    """

    def __init__(self, path: Path, machine: dict[str, str]):
        self.path, self.machine = path, machine
        self._name = _digest(machine)

    def load(self) -> Answers:
        """What this machine has answered; empty if nothing, or if the file cannot be used."""
        return _answers(self._read().get(self._name, {}))

    def add(self, answers: Answers, replace: bool = False) -> Answers:
        """Write answers, and return what holds now.

        Args:
            replace: if not, what another process has written meanwhile stays, so that all of them do the same.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                machines = self._read()
                held = _answers(machines.get(self._name, {}))
                merged = {**held, **answers} if replace else {**answers, **held}
                machines[self._name] = {"machine": self.machine, "answers": _plain(merged)}
                _write(self.path, {"format": _FORMAT, "version": _VERSION, "machines": machines})
                return merged
        except OSError as error:
            warnings.warn(
                f"What was measured cannot be kept in {str(self.path)!r} ({error}) and will be measured again by the "
                "next process. FastConfig.tuning names another file.",
                stacklevel=2,
            )
            return answers

    def digest(self, answers: Answers) -> str:
        """16 hex digits that stand for the machine and its answers."""
        return _digest([self.machine, _plain(answers)])

    def _read(self) -> dict:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']!r} {content['version']!r}")
            for machine in content["machines"].values():
                _answers(machine)
            return content["machines"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{str(self.path)!r} holds no measurements that this version of fastdiff can read ({error!r}); this "
                "machine is measured again.",
                stacklevel=3,
            )
            return {}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _answers(machine: dict) -> Answers:
    return {
        key: {name: Outcome(**{**fields, "ratio": _triple(fields["ratio"])}) for name, fields in outcomes.items()}
        for key, outcomes in machine.get("answers", {}).items()
    }


def _triple(values: list) -> tuple[float, float, float]:
    low, middle, high = (float(value) for value in values)
    return low, middle, high


def _plain(answers: Answers) -> dict:
    return {
        key: {name: _rounded(dataclasses.asdict(outcome)) for name, outcome in outcomes.items()}
        for key, outcomes in answers.items()
    }


def _rounded(fields: dict) -> dict:
    ms = fields["ms"]
    error = float(f"{fields['error']:.3g}")
    return {
        **fields,
        "ms": None if ms is None else float(f"{ms:.4g}"),
        "ratio": [float(f"{value:.4g}") for value in fields["ratio"]],
        "error": error if error == error and abs(error) != float("inf") else 1e30,
    }


def _write(path: Path, content: dict) -> None:
    # Whole or not at all, whenever the process ends.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. Where files cannot be locked, the last one wins."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
