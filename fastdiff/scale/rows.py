"""The prompts file of a batch job: one JSON object per line, one picture each."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..errors import UsageError
from .requests import RowRequest, problems

_SHOWN = 3


@dataclass(frozen=True)
class Row:
    """A line of the prompts file.

    Args:
        number: of the line, from 1.
        request: with its seed.
        key: 16 hex digits that stand for all settings of the picture. They do not change when lines are
            moved, added or removed; equal lines are told apart by their order.
    """

    number: int
    request: RowRequest
    key: str

    @property
    def file_name(self) -> str:
        """Name of the picture: the start of the prompt, for people, and the key."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower())[:40].strip("-")
        return f"{slug}-{self.key}.png" if slug else f"{self.key}.png"


def read_rows(path: Path, settings: dict) -> list[Row]:
    """Read and check a whole prompts file. Lines without a seed get one that follows from their text.

    Args:
        path: UTF-8, one JSON object per line with the fields of `RowRequest`; empty lines are skipped.
        settings: what else decides the pictures (model, preset, dtype); goes into the keys.

    Raises:
        UsageError: the file cannot be read or lines are wrong; names the first of them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from error
    rows, wrong = [], []
    seen: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = RowRequest.model_validate_json(line)
        except ValidationError as error:
            wrong.append(f"line {number}: {problems(error)}")
            continue
        if missing := [file for file, _ in request.loras if not Path(file).is_file()]:
            wrong.append(f"line {number}: lora: the file {missing[0]!r} does not exist")
            continue
        fields = _fields(request)
        occurrence = _digest(fields)
        seen[occurrence] += 1
        if request.seed is None:
            request = request.model_copy(update={"seed": int(_digest(fields, seen[occurrence])[:8], 16)})
        key = _digest(_fields(request), seen[occurrence], settings)[:16]
        rows.append(Row(number, request, key))
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UsageError(f"{str(path)!r}: {'; '.join(wrong[:_SHOWN])}{more}")
    if not rows:
        raise UsageError(f"{str(path)!r} holds no rows; write one JSON object per line, {{\"prompt\": ...}}")
    return rows


def _fields(request: RowRequest) -> dict:
    # Rows without adapters keep the keys that they had before there were any.
    return request.model_dump(exclude=None if request.lora else {"lora"})


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
