"""Layers as questions: one for each distinct kind and size, whose options are the forms that it may take."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .question import Option, Question

PLAIN = "plain"
# For layers of models whose inputs could not be found out.
_TOKENS, _SIDE = (2, 1024), (2, 32, 32)
# A prime, so that no two rows are alike.
_DRAWN = 100_003
# |difference| / |result| that rounding makes, twice over.
_ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}


class Candidate(Protocol):
    """What a layer can be made into: see `weights.places`."""

    @property
    def name(self) -> str: ...

    @property
    def lossless(self) -> bool: ...

    @property
    def takes(self) -> Callable[[str, Any], bool]: ...

    @property
    def make(self) -> Callable[[Any, None], None]: ...


def layer_key(layer: Any) -> str:
    """The kind, sizes and dtype of a linear layer, convolution or GEGLU, in words; the same whatever its form."""
    inner = _inner(layer)
    dtype = inner.kind.dtype if hasattr(inner, "kind") else inner.weight.dtype
    kind = str(dtype).removeprefix("torch.")
    if isinstance(inner, nn.Conv2d):
        height, width = inner.kernel_size
        sizes = f"{inner.in_channels} to {inner.out_channels}, {height}x{width}"
        sizes += f", stride {inner.stride[0]}" if inner.stride != (1, 1) else ""
        sizes += f", padding {inner.padding[0]}"
        sizes += f", {inner.groups} groups" if inner.groups > 1 else ""
    else:
        sizes = f"{inner.in_features} to {inner.out_features}"
    name = "GEGLU" if inner is not layer else "convolution" if isinstance(layer, nn.Conv2d) else "linear"
    return f"{name} {sizes}, {kind}"


def layer_questions(
    places: Mapping[str, Any],
    forms: Iterable[Candidate],
    keys: set[str],
    shapes: Callable[[], Mapping[str, tuple[int, ...]]],
) -> list[Question]:
    """The questions of those keys, each over the first layer that has it, with the inputs that most of them get.

    Args:
        places: layers by name.
        forms: in the order in which they are looked at; of equally fast ones the first is taken.
        keys: see `layer_key`.
        shapes: finds what layers are given, by their stock names.
    """
    found = shapes()
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in places.items():
        if (key := layer_key(layer)) in keys:
            groups.setdefault(key, {})[name] = layer
    questions = []
    for key, layers in groups.items():
        layer = next(iter(layers.values()))
        taken = [form for form in forms if any(form.takes(name, layer) for name, layer in layers.items())]
        counted = Counter(shape for name in layers if (shape := found.get(_stock_name(name))) is not None)
        shape = counted.most_common(1)[0][0] if counted else _default_shape(layer)
        # A form is given up by the twin alone.
        plain = _twin(layer)
        options = (Option(PLAIN, functools.partial(_twin, plain)), *(_option(form, plain) for form in taken))
        questions.append(Question(key, options, _inputs(plain, shape), _ROUNDING[_weight(plain).dtype]))
    return questions


def _option(form: Candidate, layer: Any) -> Option:
    def make() -> Any:
        twin = _twin(layer)
        form.make(twin, None)
        return twin

    return Option(form.name, make, form.lossless)


def _twin(layer: Any) -> Any:
    """A plain layer over the same weights, without the hooks; what is done to it leaves the layer as it is."""
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers"):
        twin.__dict__[name] = dict(layer.__dict__[name])
    twin._modules = {name: _twin(child) for name, child in layer._modules.items() if child is not None}
    for name in [name for name in twin.__dict__ if name.endswith("_hooks")]:
        twin.__dict__[name] = {}
    if hasattr(twin, "give_up"):
        twin.give_up()
    return twin


def _weight(layer: Any) -> torch.Tensor:
    return _inner(layer).weight


def _inner(layer: Any) -> Any:
    """The layer itself, or a GEGLU's projection; an adapter is no part of it."""
    proj = layer.proj if isinstance(layer, GEGLU) else layer
    return proj.get_base_layer() if isinstance(proj, BaseTunerLayer) else proj


def _stock_name(name: str) -> str:
    # A fused projection is given what its parts are.
    return name.removesuffix("to_qkv") + "to_q" if name.endswith(".to_qkv") else name


def _default_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        return _SIDE[0], layer.in_channels, *_SIDE[1:]
    return *_TOKENS, _weight(layer).shape[1]


def _inputs(layer: Any, shape: tuple[int, ...]) -> Callable[[str, float], tuple[torch.Tensor]]:
    weight = _weight(layer)
    dtype, device = weight.dtype, weight.device

    def ordinary(*sizes: int) -> torch.Tensor:
        # Some numbers over and over: to draw as many as a call takes would be a good part of measuring it.
        drawn = torch.randn(min(_DRAWN, math.prod(sizes)), generator=torch.Generator().manual_seed(0))
        return drawn.repeat(-(-math.prod(sizes) // len(drawn)))[: math.prod(sizes)].view(sizes)

    def make(kind: str, share: float) -> tuple[torch.Tensor]:
        if isinstance(layer, nn.Conv2d):
            batch, channels, height, width = shape
            if kind == "one row":
                batch, height = 1, layer.kernel_size[0]
            # Rows of pixels are left out: their length is what a kernel is made for.
            rows = min(height, max(layer.kernel_size[0], round(height * share)))
            x = ordinary(batch, channels, rows, width).to(memory_format=torch.channels_last)
        else:
            rows = 1 if kind == "one row" else max(2, round(math.prod(shape[:-1]) * share))
            x = ordinary(rows, shape[-1])
        if kind == "zero rows":
            x[..., : max(1, x.shape[-2] // 2), :] = 0
        elif kind == "zeros":
            x.zero_()
        elif kind == "large":
            x *= 1000
        return (x.to(device, dtype),)

    return make
