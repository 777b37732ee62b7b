"""Loading a fast pipeline: from a directory or model id, from one file, or from another pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..compiler.artifacts import read_artifacts
from ..config import FastConfig
from ..models.offload import inner_offloading
from ..weights import load_quantized, quantized_scheme_of
from . import checkpoints
from .components import convert_component

# To a type checker the stock class that the mixin comes before.
_Stock: Any = object
# The configuration of the pipeline that is being loaded: a subclass's constructor need not know of it.
_loading: ContextVar[FastConfig | None] = ContextVar("fastdiff_loading", default=None)


def loading_config() -> FastConfig | None:
    """The configuration of the pipeline that is being loaded now, or None."""
    return _loading.get()


@contextmanager
def _loading_with(config: FastConfig) -> Iterator[None]:
    token = _loading.set(config)
    try:
        yield
    finally:
        _loading.reset(token)



class FastLoadingMixin(_Stock):
    """`from_pretrained`, `from_single_file` and `from_pipe` with the arguments `fast` and `compiled`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        fast: FastConfig | str | None = None,
        compiled: str | os.PathLike | None = None,
        **kwargs,
    ):
        """Load an SDXL checkpoint as the stock class does, and make it fast.

        Args:
            pretrained_model_name_or_path: a directory written by `save_pretrained`, or a model id of the hub.
            fast: a `FastConfig`, a preset's name, or None for the default.
            compiled: a file written by `save_compiled`. It is code: load only your own. One that is damaged or was
                made for something else is not used, and a warning says why.
            kwargs: as in the stock class. Without `torch_dtype`, `FastConfig.dtype` decides. Only safetensors are
                loaded unless `use_safetensors=False` is given.

        Raises:
            ValueError: the path is no checkpoint, not SDXL, holds no safetensors, or the preset is unknown; it is
                quantized with another scheme than `fast` asks for; or there is no file `compiled`.
        """
        config = FastConfig.resolve(fast)
        checkpoints.check_checkpoint(cls, pretrained_model_name_or_path, kwargs)
        artifacts = read_artifacts(compiled)
        _choose_dtype(config, kwargs)
        _load_quantized(pretrained_model_name_or_path, config, kwargs)
        with _loading_with(config):
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe._artifacts = artifacts
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        *,
        fast: FastConfig | str | None = None,
        compiled: str | os.PathLike | None = None,
        **kwargs,
    ):
        """Load one safetensors file in Stability AI's original layout, as the stock class does, and make it fast.

        Args:
            pretrained_model_link_or_path: a local file, or a link to a file of the hub.
            fast: a `FastConfig`, a preset's name, or None for the default.
            compiled: as in `from_pretrained`.
            kwargs: as in the stock class. Without `torch_dtype`, `FastConfig.dtype` decides. `config` names a local
                directory in the diffusers layout whose configurations and tokenizers are taken; without it they
                come from the hub.

        Raises:
            ValueError: a file does not exist, or the model's is not safetensors, or is not SDXL.
        """
        config = FastConfig.resolve(fast)
        checkpoints.check_single_file(pretrained_model_link_or_path)
        artifacts = read_artifacts(compiled)
        _choose_dtype(config, kwargs)
        with _loading_with(config):
            pipe = super().from_single_file(str(pretrained_model_link_or_path), **kwargs)
        pipe._artifacts = artifacts
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        fast: FastConfig | str | None = None,
        compiled: str | os.PathLike | None = None,
        **kwargs,
    ):
        """Make a fast pipeline from any SDXL pipeline, stock or fast, over the same weights.

        Weights keep their dtype and place, and no memory is added. `pipeline` keeps working. From a fast pipeline
        the very same components are taken, with what is compiled and cached.

        Args:
            pipeline: the source.
            fast: a `FastConfig`, a preset's name, or None for the source's configuration or else the default.
            compiled: as in `from_pretrained`.
            kwargs: components or options that replace those of `pipeline`; `torch_dtype` casts.

        Raises:
            TypeError: `pipeline` is no diffusers pipeline.
            ValueError: a component that this class needs is missing, `pipeline` uses perturbed-attention guidance, it
                is a stock one that is offloaded, or there is no file `compiled`.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(f"from_pipe takes a diffusers pipeline, not a {type(pipeline).__name__}.")
        if hasattr(pipeline, "set_pag_applied_layers"):
            raise ValueError(
                f"Perturbed-attention guidance has no fast class, and {cls.__qualname__} would leave it out. Keep "
                f"{type(pipeline).__name__}, or go without it by StableDiffusionXLPipeline.from_pipe(pipeline) first."
            )
        artifacts = read_artifacts(compiled)
        if fast is None:
            fast = getattr(pipeline, "fast_config", None)
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        required, options = cls._get_signature_keys(cls)
        source = {**pipeline.config, **pipeline.components}
        arguments = {name: source[name] for name in [*required, *options] if name in source}
        arguments.update(kwargs)
        unet: Any = arguments.get("unet")
        if type(unet) is UNet2DConditionModel and (hasattr(unet, "_hf_hook") or inner_offloading(unet)):
            raise ValueError(
                "from_pipe cannot share weights that are offloaded: make the fast pipeline first and switch offloading "
                "on there, or call pipeline.remove_all_hooks() before."
            )
        missing = [name for name in required if name not in arguments and name not in cls._optional_components]
        if missing:
            listed = ", ".join(missing)
            raise ValueError(f"{cls.__qualname__}.from_pipe: pass {listed}; {type(pipeline).__name__} has none.")
        with _loading_with(FastConfig.resolve(fast)):
            made = cls(**arguments)
        made._artifacts = artifacts
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if isinstance(pipeline, FastLoadingMixin) and made.scheduler is pipeline.scheduler:
            # Two pipelines over one scheduler: calls that overlap are told apart as those of one pipeline are.
            made._calls = pipeline._calls
        return made if dtype is None else made.to(dtype)


def _choose_dtype(config: FastConfig, kwargs: dict) -> None:
    if "torch_dtype" not in kwargs and "dtype" not in kwargs:
        kwargs["dtype"] = checkpoints.loading_dtype(config)


def _load_quantized(path: str | os.PathLike, config: FastConfig, kwargs: dict) -> None:
    """Put the models of a checkpoint that are saved quantized among the components; stock cannot read them."""
    for name in ("unet", "controlnet"):
        folder = Path(path) / name
        if name not in kwargs and quantized_scheme_of(folder) is not None:
            model = load_quantized(folder, config.quantization, partial(convert_component, name, config=config))
            dtype = kwargs.get("torch_dtype", kwargs.get("dtype"))
            kwargs[name] = model.to(dtype) if isinstance(dtype, torch.dtype) else model
