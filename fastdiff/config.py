"""`FastConfig`: one switch for each optimisation, and the presets that set them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COMPILE_MODES = ("auto", "regional", "full", "off")
ATTENTION_KERNELS = ("auto", "pytorch")
QUANTIZATION_SCHEMES = ("auto", "fp8-dynamic", "int8-dynamic", "fp8-weight-only", "int8-weight-only", "none")

_PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"quantization": "none", "dtype": "stock"},
    "balanced": {},
    "max": {"compile": "full", "cuda_graphs": True},
    "off": {
        "compile": "off",
        "quantization": "none",
        "fuse_qkv": False,
        "context_cache": False,
        "channels_last": False,
        "pack_weights": False,
        "attention": "pytorch",
        "host_schedule": False,
        "cuda_graphs": False,
        "dtype": "stock",
    },
}


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """What fastdiff applies to a pipeline. Immutable; derive variants with `preset(name, **overrides)`.

    Args:
        compile: `"regional"` compiles the repeated blocks, `"full"` the whole UNet and VAE decoder, `"off"` nothing;
            `"auto"` chooses by device and model size.
        quantization: a scheme of `QUANTIZATION_SCHEMES`; `"auto"` takes the one of the device, on CPUs in those layers
            where it is measured to win (large models that are not compiled), `"none"` leaves the weights alone. Every
            scheme changes results, and its first call lets go of the plain weights.
        fuse_qkv: one self-attention projection in place of three, in shared storage.
        context_cache: cross-attention keys and values computed once per prompt, not once per step.
        channels_last: NHWC memory format for convolutions.
        pack_weights: on CPUs, weights in oneDNN's own layout, in place of the plain ones; `"auto"` packs large models
            that are not compiled and share their weights with no stock model.
        attention: `"auto"` takes in large models, where it is measured to win, on CPUs a kernel of ours, or where that
            cannot be compiled and `quantization` is not `"none"`, products that round scores; on GPUs a kernel of
            PyTorch's in place of its choice; `"pytorch"` that choice. A backend of `set_attention_backend` comes
            before either.
        host_schedule: schedulers that keep their schedule on the CPU, so that no step waits for the device.
        cuda_graphs: replay the UNet step, ControlNets and the VAE decoder as CUDA graphs. On CUDA only, where
            `"auto"` means True; elsewhere, with offloading and with deep_cache, the plan says why not.
        dtype: dtype that weights are loaded in: `"auto"` takes bfloat16 where the device computes it natively,
            `"stock"` what the stock class would take, or a torch dtype. An explicit `torch_dtype` of
            `from_pretrained` always wins.
        guidance_interval: lossy. Classifier-free guidance only from the first to the second of these fractions of
            the steps, for example `(0.1, 0.8)`; outside of it the UNet does half the work.
        deep_cache_interval: lossy. The UNet's inner blocks run in every n-th step only, for example 2 or 3; not with
            `compile="full"` or `cuda_graphs=True`, which take the UNet as one piece.
        strict: an optimisation that fails on this machine raises its error. By default it is taken off with one
            warning, and the picture is drawn.
        tuning: where the measurements are kept by which large models choose on CPUs: `"auto"` is a file in the user's
            cache folder, anything else the path of one, which workers may share so that they draw the same bits.
            What it lacks is measured at the first plan, in seconds. `"off"` measures nothing and takes a shipped
            table.

    Raises:
        TypeError: a field that does not exist.
        ValueError: a value outside the field's choices.
    """

    compile: str = "auto"
    quantization: str = "auto"
    fuse_qkv: bool = True
    context_cache: bool = True
    channels_last: bool = True
    pack_weights: str | bool = "auto"
    attention: str = "auto"
    host_schedule: bool = True
    cuda_graphs: str | bool = "auto"
    dtype: str | torch.dtype = "auto"
    guidance_interval: tuple[float, float] | None = None
    deep_cache_interval: int | None = None
    strict: bool = False
    tuning: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("compile", self.compile, COMPILE_MODES)
        _check_choice("quantization", self.quantization, QUANTIZATION_SCHEMES)
        _check_choice("attention", self.attention, ATTENTION_KERNELS)
        for name in ("fuse_qkv", "context_cache", "channels_last", "host_schedule", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"FastConfig.{name} must be True or False, not {getattr(self, name)!r}.")
        for name in ("pack_weights", "cuda_graphs"):
            if getattr(self, name) != "auto" and not isinstance(getattr(self, name), bool):
                raise ValueError(f'FastConfig.{name} must be "auto", True or False, not {getattr(self, name)!r}.')
        _check_dtype(self.dtype)
        if not isinstance(self.tuning, str) or not self.tuning:
            raise ValueError(f'FastConfig.tuning must be "auto", "off" or the path of a file, not {self.tuning!r}.')
        _check_guidance_interval(self.guidance_interval)
        _check_deep_cache_interval(self.deep_cache_interval)
        if self.deep_cache_interval is not None and (self.compile == "full" or self.cuda_graphs is True):
            raise ValueError(
                "FastConfig.deep_cache_interval does not go with compile='full' or cuda_graphs=True, which take the "
                "UNet as one piece; use compile='regional' and cuda_graphs=False."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> FastConfig:
        """Make the configuration of a preset, with some fields replaced.

        Args:
            name: `"exact"` (lossless steps only), `"balanced"` (the default: exact and the device's quantization),
                `"max"` (full-graph compile and CUDA graphs; slow first call) or `"off"` (stock behaviour).
            overrides: fields of `FastConfig`.

        Raises:
            ValueError: unknown preset or a value outside the field's choices.
            TypeError: an override that is no field of `FastConfig`.
        """
        _check_choice("preset", name, tuple(_PRESETS))
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                raise TypeError(f"FastConfig has no field {key!r}.{_suggest(key, fields)}")
        return cls(**{**_PRESETS[name], **overrides})

    @classmethod
    def resolve(cls, fast: FastConfig | str | None) -> FastConfig:
        """Turn the `fast` argument of a pipeline into a `FastConfig`: None is `"balanced"`, a string a preset."""
        if fast is None:
            return cls.preset("balanced")
        if isinstance(fast, str):
            return cls.preset(fast)
        if isinstance(fast, cls):
            return fast
        raise TypeError(f"fast must be a FastConfig, a preset name or None, not {type(fast).__name__}.")

    @property
    def is_off(self) -> bool:
        """True when nothing at all is to be applied, so that the stock classes stay in place."""
        return self == FastConfig.preset("off", dtype=self.dtype, strict=self.strict, tuning=self.tuning)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        label = "Unknown preset" if name == "preset" else f"Unknown value for FastConfig.{name}:"
        raise ValueError(f"{label} {value!r}; choose one of {listed}.{_suggest(str(value), choices)}")


def _check_dtype(value: object) -> None:
    if value in ("auto", "stock"):
        return
    import torch  # seconds, which the command line does not have to spend on names that it refuses

    if not isinstance(value, torch.dtype):
        raise ValueError(f'FastConfig.dtype must be "auto", "stock" or a torch.dtype, not {value!r}.')


def _check_guidance_interval(value: Any) -> None:
    if value is None:
        return
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    if not is_pair or not 0.0 <= value[0] < value[1] <= 1.0:
        raise ValueError(
            "FastConfig.guidance_interval must be None or a pair (start, end) with 0 <= start < end <= 1, "
            f"not {value!r}."
        )


def _check_deep_cache_interval(value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 2):
        raise ValueError(f"FastConfig.deep_cache_interval must be None or an integer of 2 or more, not {value!r}.")


def _suggest(word: str, known) -> str:
    close = get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
