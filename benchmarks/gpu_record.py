"""The figures of a GPU run: one line of JSON each, in the file the moment it exists."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Record:
    """A file of figures that a run appends to and a later one goes on with.

    A line has `part` and either `figure` and `value`, `figure` and `error`, or the `state` of the whole part: "done",
    "failed" or "cut off", with `why`.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def add(self, part: str, **fields: Any) -> None:
        """Write a line, and see it onto the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict]:
        """All lines; a last one that was cut off while it was written is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def figures(self, part: str | None = None) -> dict[tuple[str, str], Any]:
        """Values by part and figure."""
        lines = [line for line in self.lines() if "value" in line and part in (None, line["part"])]
        return {(line["part"], line["figure"]): line["value"] for line in lines}

    def states(self) -> dict[str, tuple[str, str]]:
        """The last state of each part, and why."""
        return {line["part"]: (line["state"], line.get("why", "")) for line in self.lines() if "state" in line}


class Part:
    """What one part measures: every figure is saved when it exists, and one that fails is told and left out."""

    def __init__(self, name: str, record: Record):
        self.name, self.record, self.failed = name, record, 0
        self._held = {figure: value for (_, figure), value in record.figures(name).items()}

    def figure(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure, unless an earlier run has; returns the value, or None where it could not be had."""
        if name in self._held:
            return self._held[name]
        try:
            value = measure()
        except Exception as error:
            self.failed += 1
            why = f"{type(error).__name__}: {error}".strip()
            print(f"{self.name}: {name}: FAILED: {why}", flush=True)
            traceback.print_exc()
            self.record.add(self.name, figure=name, error=why[:2000])
            return None
        self._held[name] = value
        self.record.add(self.name, figure=name, value=value)
        print(f"{self.name}: {name}: {_short(value)}", flush=True)
        return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:297] + "..."
