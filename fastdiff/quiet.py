"""Keeps what libraries log while they are imported off the console: nothing a user of fastdiff could act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# torchao tells of kernels for other machines, and torch of torchao's use of its pytrees.
_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Only errors are logged by torch, torchao, transformers and diffusers within the block; then all is as before."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = {name: logging.getLogger(name) for name in _LOGGERS}
    levels = {name: logger.level for name, logger in loggers.items()}
    libraries = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        for library, _ in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in libraries:
            library.set_verbosity(verbosity)
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
