"""How a command loads its pipeline, and keeps the libraries quiet meanwhile."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from ..errors import UsageError
from .arguments import fast_config
from .hub import check_model

_FULL_ON_CPU = (
    "compiling the whole UNet and VAE on a CPU takes a minute or more; --compile regional takes less, and the default "
    "preset needs no compiler"
)


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what `add_model_arguments` can get wrong, before any library is imported."""
    fast_config(arguments)
    arguments.online = check_model(arguments.model)


def load_pipeline(arguments: argparse.Namespace):
    """Load the pipeline that `add_model_arguments` describe, on its device.

    Raises:
        UsageError: whatever is wrong with the checkpoint or the device.
    """
    import torch

    from ..pipelines import FastStableDiffusionXLPipeline
    from ..pipelines.loras import LoraShelf

    config, device = fast_config(arguments), usable_device(arguments.device)
    options = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    if not arguments.online:
        print("fastdiff: the hub does not answer; drawing with the files that it gave earlier", file=sys.stderr)
        options["local_files_only"] = True
    if config.compile == "full" and device.type == "cpu":
        print(f"fastdiff: {_FULL_ON_CPU}", file=sys.stderr)
    try:
        options["compiled"] = getattr(arguments, "compiled", None)
        pipe = FastStableDiffusionXLPipeline.from_pretrained(arguments.model, fast=config, **options)
        LoraShelf(pipe).use(getattr(arguments, "lora", None) or ())
        return pipe.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def usable_device(name: str | None):
    """The torch device of a `--device`; by default the GPU if there is one.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        here = f"there are {count} CUDA devices here" if count else "no CUDA device is available here"
        raise UsageError(f"--device {device}: {here}")
    return device


def quiet_libraries() -> None:
    """Keep the libraries' notices, bars and retries off the console; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="huggingface_hub")

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
