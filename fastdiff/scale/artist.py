"""The warm pipeline of one worker process."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import EMBEDDED_CHECKPOINT
from ..choices import tuning_digest
from ..config import FastConfig
from ..pipelines.loras import LoraShelf
from ..pipelines.memory import check_memory
from ..pipelines.sdxl import FastStableDiffusionXLPipeline
from .requests import PictureRequest, parse_size


@dataclass(frozen=True)
class ModelChoice:
    """What a worker loads. Chosen by whoever starts the job or the server, never by a row or a request.

    Args:
        model: a checkpoint directory or model id that every worker can read; None is the embedded checkpoint,
            which each worker finds in its own installation.
        preset: a preset of `FastConfig`.
        switches: fields of `FastConfig` in place of the preset's, as pairs of name and value.
        dtype: a dtype's name, or None for what the preset takes.
        device: a torch device's name.
        loras: files, that every worker can read, and weights of the adapters to draw with.
        threads: of torch on the CPU; fixed, because sums over another number of threads round differently.
    """

    model: str | None
    preset: str
    dtype: str | None
    device: str
    threads: int
    switches: tuple[tuple[str, object], ...] = ()
    loras: tuple[tuple[str, float], ...] = ()


class Artist:
    """One pipeline, loaded once, that draws lists of requests which share size, steps and guidance.

    Every picture has a generator of its own on the CPU, so it depends on its seed and neither on the pictures
    it shares a batch with (beyond rounding) nor on the device that draws the noise.
    """

    def __init__(self, choice: ModelChoice):
        torch.set_num_threads(choice.threads)
        options = {} if choice.dtype is None else {"dtype": getattr(torch, choice.dtype)}
        self.pipe = FastStableDiffusionXLPipeline.from_pretrained(
            choice.model or EMBEDDED_CHECKPOINT,
            fast=FastConfig.preset(choice.preset, **dict(choice.switches)),
            **options,
        ).to(choice.device)
        self._shelf, self._loras = LoraShelf(self.pipe), choice.loras
        self._shelf.use(choice.loras)
        self.pipe.set_progress_bar_config(disable=True)
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        self.native_size = (side, side)

    def size(self, request: PictureRequest) -> tuple[int, int]:
        """(width, height) in pixels that a request will have."""
        return self.native_size if request.size is None else parse_size(request.size)

    def batch_key(self, request: PictureRequest) -> tuple:
        """Requests with equal keys can be drawn together."""
        # Without a negative prompt SDXL takes zeros, not the embedding of an empty text, for the whole call.
        return self.size(request), request.steps, request.guidance, request.negative_prompt is None

    def batch_limit(self, request: PictureRequest, most: int) -> int:
        """How many pictures like this one fit in the memory that `most` of the model's own size take."""
        width, height = self.size(request)
        return max(1, min(most, most * self.native_size[0] * self.native_size[1] // (width * height)))

    def warm_up(self, batch: int = 1) -> None:
        """Compile and fill caches for the model's own size."""
        self.pipe.warmup(sizes=[self.native_size], batch_sizes=sorted({1, batch}))

    def use_loras(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Draw with these adapters beside those of the job from now on; files and weights.

        Raises:
            ValueError: a file holds no LoRA for SDXL.
        """
        self._shelf.use((*self._loras, *loras))

    def tuning(self) -> str | None:
        """What stands for the measurements that the choices of the last picture come from, or None."""
        return tuning_digest(self.pipe)

    def draw(
        self,
        requests: Sequence[PictureRequest],
        after_step: Callable[[int], bool] = lambda done: True,
        output_type: str = "pil",
    ):
        """Draw pictures in one call of the pipeline.

        Args:
            requests: with seeds, all with the same `batch_key`.
            after_step: told after every step how many are done, and answers whether the picture is still wanted;
                once it says no, the other steps are left out, the result void.
            output_type: of the pipeline; `"pil"` gives a list, `"pt"` (batch, 3, height, width) in 0..1.

        Raises:
            ValueError: no device memory can hold pictures of that size.
        """

        def stop_unless_wanted(pipe, step, timestep, tensors):
            pipe._interrupt = pipe._interrupt or not after_step(step + 1)
            return tensors

        first, (width, height) = requests[0], self.size(requests[0])
        check_memory(self.pipe.vae.config, (width, height), len(requests), self.pipe.vae.dtype, self.pipe.device)
        plain = first.negative_prompt is None
        return self.pipe(
            prompt=[request.prompt for request in requests],
            negative_prompt=None if plain else [request.negative_prompt for request in requests],
            width=width,
            height=height,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            generator=[torch.Generator("cpu").manual_seed(r.seed) for r in requests],  # type: ignore[arg-type]  # set
            callback_on_step_end=stop_unless_wanted,
            output_type=output_type,
        ).images


def png_bytes(picture) -> bytes:
    """Encode a PIL picture as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
