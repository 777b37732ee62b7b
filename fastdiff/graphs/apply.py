"""Where graphs are put on the models of a pipeline, and taken off."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .method import GraphedMethod
from .pool import GraphPool


def why_no_graphs(requested: str | bool, device: torch.device) -> str | None:
    """Why nothing is recorded on a device, or None if it is."""
    if requested is False:
        return "switched off by FastConfig.cuda_graphs"
    if device.type != "cuda":
        return f"there are none on {device.type}"
    return None if torch.cuda.is_available() else "no CUDA device is available"


def apply_graphs(models: Iterable[nn.Module], pool: GraphPool, lasting: type) -> int:
    """Have UNets, ControlNets and VAE decoders replay graphs. To be called after compiling.

    Args:
        pool: keeps the graphs of all of them.
        lasting: as for `GraphedMethod`.

    Returns:
        The number of methods.
    """
    remove_graphs(models)
    targets = [target for model in models if (target := _target(model)) is not None]
    for module, name in targets:
        setattr(module, name, GraphedMethod(module, name, pool, lasting))
    return len(targets)


def remove_graphs(models: Iterable[nn.Module]) -> None:
    """Take off what `apply_graphs` put on, and free the graphs."""
    for method in graphed_methods(models):
        method.clear()
        if method.replaced is None:
            delattr(method.module, method.name)
        else:
            setattr(method.module, method.name, method.replaced)


def graphed_methods(models: Iterable[nn.Module]) -> list[GraphedMethod]:
    """The methods of models that `apply_graphs` has replaced."""
    targets = [target for model in models if (target := _target(model)) is not None]
    methods = [module.__dict__.get(name) for module, name in targets]
    return [method for method in methods if isinstance(method, GraphedMethod)]


def graph_pools(models: Iterable[nn.Module]) -> list[GraphPool]:
    """The pools that the graphs of models are in, each once."""
    return list({id(method.pool): method.pool for method in graphed_methods(models)}.values())


def _target(model: nn.Module | None) -> tuple[nn.Module, str] | None:
    """Module and method that run on the device alone."""
    for name in ("denoise", "condition"):
        if model is not None and hasattr(model, name):
            return model, name
    decoder = getattr(model, "decoder", None)
    return None if decoder is None else (decoder, "forward")
