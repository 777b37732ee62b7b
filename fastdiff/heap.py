"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give the system back what is free in the heap.

    glibc keeps what lies between blocks that are in use. After every weight was laid out anew, one by one, that is
    gigabytes, which the process would hold beside the weights until it ends. Other C libraries do not need this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
