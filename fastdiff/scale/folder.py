"""The output folder of a batch job: pictures and a manifest, whole whenever a process ends."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from ..errors import UsageError

MANIFEST = "manifest.jsonl"


class OutputFolder:
    """Pictures under their final names only when complete, and one manifest line for each.

    A row is done when its manifest line and its picture are both there. The picture is written first, so what
    a crash leaves half done is a picture without a line, which the next run writes again under the same name.
    One process at a time: the folder is locked until it is closed or the process ends, however it ends.

    Args:
        path: made if need be.

    Raises:
        UsageError: no folder can be made there, another job uses it, or the manifest holds foreign lines.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")
        except OSError as error:
            raise UsageError(f"--out {str(path)!r}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UsageError(f"--out {str(path)!r}: another batch job is writing to this folder") from error
        self.done: set[str] = set()
        try:
            self._reconcile()
        except BaseException:
            self._lock.close()
            raise
        self._manifest = open(path / MANIFEST, "ab")

    def add(self, line: dict, png: bytes) -> None:
        """Put a finished picture and its manifest line on disk; returns once both are safe.

        Args:
            line: with `key` and `file`.
            png: contents of the picture.
        """
        _write_whole(self.path / line["file"], png)
        self._manifest.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._manifest.flush()
        os.fsync(self._manifest.fileno())
        self.done.add(line["key"])

    def close(self) -> None:
        """Let another job use the folder."""
        self._manifest.close()
        self._lock.close()

    def _reconcile(self) -> None:
        """Keep the manifest lines whose pictures exist; drop a torn last line and half-written files."""
        for leftover in self.path.glob(".*.partial"):
            leftover.unlink()
        manifest = self.path / MANIFEST
        if not manifest.exists():
            return
        whole = manifest.read_bytes()
        *lines, _torn = whole.split(b"\n")
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                key, file = entry["key"], entry["file"]
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(
                    f"{str(manifest)!r} line {number} is no manifest line: repair it or choose another --out"
                ) from error
            if key not in self.done and (self.path / file).is_file():
                self.done.add(key)
                kept.append(line + b"\n")
        if b"".join(kept) != whole:
            _write_whole(manifest, b"".join(kept))


def _write_whole(path: Path, contents: bytes) -> None:
    """Make a file appear complete or not at all, also after a power failure."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
