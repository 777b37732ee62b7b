"""Memory of weights that are mapped from their file: as forms take their place, their pages can go at once.

Weights of one safetensors file share a mapping, which lives as long as any of them. Without this, all that was read of
a checkpoint stays resident beside the forms that were made of it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

# Linux's MADV_PAGEOUT: what can be read back is dropped, and nothing is lost.
_PAGEOUT = 21
# Layers that get another form from one time to the next.
LAYERS_AT_A_TIME = 32


class MappedFiles:
    """Where files are mapped in this process; nowhere on systems that do not say.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Iterable[Path]):
        wanted = {str(path.resolve()) for path in paths}
        self._ranges: list[tuple[int, int]] = []
        if not (wanted and sys.platform == "linux"):
            return
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for fields in (line.split(maxsplit=5) for line in lines):
            if len(fields) == 6 and fields[5] in wanted:
                start, _, end = fields[0].partition("-")
                self._ranges.append((int(start, 16), int(end, 16)))

    def let_go(self) -> None:
        """Drop the pages. Those of weights that are still used come back as they are read."""
        for start, end in self._ranges:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
