"""What the two legs of a contract have in common: tiny pipelines, made either way.

A contract says what somebody gains. It holds on two legs: with the stock classes of a patched diffusers
(`LEG.patched`), and with fastdiff's subclasses of a stock diffusers. The environment decides which leg runs: that of
the patched tree where `FASTDIFF_PATCHED_TREE` names one and `PYTHONPATH` its `src`, else that of fastdiff.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

CHECKPOINT = Path(__file__).parents[2] / "fastdiff" / "shapes" / "checkpoint"
STEPS = 4

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


class Leg:
    """One way to get the gains: `patched` or fastdiff."""

    def __init__(self, patched: bool):
        self.patched = patched

    def pipeline(self, scheduler: str = "EulerDiscreteScheduler") -> diffusers.StableDiffusionXLPipeline:
        """A fresh tiny SDXL pipeline in float32 whose weights nobody shares."""
        if self.patched:
            assert "fastdiff" not in sys.modules, "the patched leg must not need fastdiff"
            pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
        else:
            from fastdiff import FastStableDiffusionXLPipeline

            pipe = FastStableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, fast="exact")
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = self.scheduler(scheduler, pipe.scheduler.config, clip_sample=False)
        return pipe

    def scheduler(self, name: str, config: dict | None = None, **options) -> diffusers.SchedulerMixin:
        """A scheduler by its stock name."""
        scheduler_class = getattr(diffusers, name)
        scheduler = scheduler_class(**options) if config is None else scheduler_class.from_config(config, **options)
        if self.patched:
            return scheduler
        from fastdiff import fast_scheduler

        return fast_scheduler(scheduler)

    def cache_context(self, unet: nn.Module) -> None:
        """Have keys and values of the prompt kept; in fastdiff they are."""
        if self.patched:
            unet.enable_cache(diffusers.TextKVCacheConfig())

    def compile_regions(self, model: nn.Module, backend: Callable) -> list[nn.Module]:
        """Compile the regions of a model with a given backend, which is cheap; returns the regions."""
        if self.patched:
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
            return [module for module in model.modules() if module._compiled_call_impl is not None]
        from fastdiff.compiler.compilation import apply_compilation, repeated_blocks

        compiler = torch.compile

        def compile_for_backend(function: Callable, options: dict | None = None, **settings) -> Callable:
            """Leave out the options, which are those of another backend."""
            return compiler(function, backend=backend, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compile_for_backend)
            apply_compilation(model, "regional")
        return repeated_blocks(model)


_TREE = os.environ.get("FASTDIFF_PATCHED_TREE")
if _TREE and not Path(diffusers.__file__).is_relative_to(_TREE):
    raise RuntimeError(f"FASTDIFF_PATCHED_TREE is {_TREE}, but diffusers comes from {diffusers.__file__}")

LEG = Leg(patched=bool(_TREE))
only_patched = pytest.mark.skipif(not LEG.patched, reason="fastdiff has its own way here, with its own tests")


def draw(pipe: diffusers.DiffusionPipeline, **options) -> torch.Tensor:
    """Latents of a small picture, (batch, 4, 8, 8), or what `output_type` says."""
    call = {
        "prompt": "a red circle on a blue background",
        "num_inference_steps": STEPS,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(**{**call, **options}).images


def storage_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, each storage counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())
