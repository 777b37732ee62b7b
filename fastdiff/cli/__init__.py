"""The `fastdiff` command: one module a command, and what they share in `arguments`.

May import every room; nothing imports this one.
"""

from .main import main

__all__ = ["main"]
