"""What is made ahead of the first request: compiled code, caches, and the file that they are saved in."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..compiler import Artifacts, CompileProgress, artifact_key, choose_compile, record_traces, save_artifacts
from ..lossy import warmup_steps

# To a type checker the pipeline that the mixin is part of.
_Pipeline: Any = object


class WarmupMixin(_Pipeline):
    """`warmup` and `save_compiled` of a fast pipeline."""

    _artifacts: Artifacts | None = None
    # The plan that a picture was drawn with; before, nothing is compiled.
    _drawn_with: tuple | None = None
    # Width, height, batch and other arguments of what `warmup` drew.
    _warmed_up: tuple = ()

    def warmup(
        self, sizes: Iterable[tuple[int, int]] = ((1024, 1024),), batch_sizes: Iterable[int] = (1,), **kwargs
    ) -> None:
        """Compile and fill caches ahead of the first request, with a progress bar.

        What is compiled serves every size and length of prompt; a model that gets one sample and one that gets several
        have code of their own. So a call of one picture with guidance, as is asked for by default, leaves nothing to
        compile for other such calls; `batch_sizes=[1, 2], guidance_scale=1.0` leaves nothing for any call. (Ask for
        sizes that halve evenly: upsampling to an odd size is not compiled, so its code would still be missing.)

        Pictures, masks and control pictures that the pipeline takes are black ones unless `kwargs` has them.

        Args:
            sizes: (width, height) in pixels.
            batch_sizes: images per call.
            kwargs: passed on to the call, for example `guidance_scale`.
        """
        combinations = [(w, h, n) for w, h in sizes for n in batch_sizes]
        self._apply_plan()
        shown = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**{**shown, "disable": True})
        try:
            with CompileProgress(shown):
                for width, height, batch in tqdm(
                    combinations, desc="warm-up", unit="size", disable=shown.get("disable")
                ):
                    self(**{**self._warmup_call(width, height, batch), **kwargs})
        finally:
            self._progress_bar_config = shown
        self._warmed_up = (*self._warmed_up, *((*combination, kwargs) for combination in combinations))

    def _warmup_call(self, width: int, height: int, batch: int) -> dict:
        interval = self.active_config.guidance_interval
        steps = 2 if interval is None else warmup_steps(interval)
        black = Image.new("RGB", (width, height))
        control = [black] * len(nets) if (nets := getattr(getattr(self, "controlnet", None), "nets", None)) else black
        accepted = inspect.signature(self.__call__).parameters
        call = {"width": width, "height": height, "image": black, "mask_image": black, "strength": 1.0}
        call["control_image" if "control_image" in accepted else "image"] = control
        call = {name: value for name, value in call.items() if name in accepted}
        return {"prompt": ["warm-up"] * batch, "num_inference_steps": steps, "output_type": "pt", **call}

    def save_compiled(self, path: str | os.PathLike) -> None:
        """Save what was compiled for this pipeline, for `from_pretrained(..., compiled=path)` in another process.

        What `warmup` drew is drawn once more, for the next process not even to trace it; other calls it will have to
        trace, which takes seconds.

        The file holds machine code and may hold other code that torch compiled in this process: whoever can write it
        can run code where it is loaded. Where it is loaded, checkpoint, device, dtype and plan must be the same.

        Args:
            path: the file to write, whole or not at all.

        Raises:
            RuntimeError: nothing was compiled: the plan compiles nothing, or no picture was drawn yet.
            OSError: the file cannot be written.
        """
        steps = self._apply_plan()
        compile_step = next((step for step in steps if step.name == "compile"), steps[0])
        if not compile_step.applied:
            raise RuntimeError(f"save_compiled: the plan compiles nothing ({compile_step.reason}).")
        if self._drawn_with != self._plan_key:
            raise RuntimeError("save_compiled: nothing is compiled yet; call pipe.warmup(...) first.")
        traces = None
        # These two wrap compiled code, and would not let new regions run.
        wrapped = any(step.applied for step in steps if step.name in ("deep_cache", "cuda_graphs"))
        if self._warmed_up and not wrapped:
            traces = record_traces(self._models(), self._compile_mode(), self._warm_up_again)
        save_artifacts(path, self._artifact_key(steps), traces)

    def _warm_up_again(self) -> None:
        warmed_up = self._warmed_up
        for width, height, batch, options in warmed_up:
            self.warmup([(width, height)], [batch], **options)
        self._warmed_up = warmed_up

    def _install_artifacts(self, steps: list) -> None:
        """Once the plan says what will be compiled, and before it is."""
        if self._artifacts is not None:
            self._artifacts.install(self._artifact_key(steps), self._models())

    def _artifact_key(self, steps: list) -> dict:
        return artifact_key(self.unet, self.vae, self._execution_device, self._compile_mode(), steps)

    def _compile_mode(self) -> str:
        return choose_compile(self.active_config.compile, self.unet, self._execution_device).mode
