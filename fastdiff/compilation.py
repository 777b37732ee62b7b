"""The compiler: which regions of UNet and VAE become graphs, and with which options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import nn

# Below this many parameters a region runs in less time than its guards and launch take to check.
_MIN_PARAMETERS = 100_000_000


@dataclass(frozen=True)
class CompileChoice:
    """How to compile, `"regional"`, `"full"` or `"off"`, and why."""

    mode: str
    reason: str


def choose_compile(requested: str, module: nn.Module, device: torch.device) -> CompileChoice:
    """Settle `FastConfig.compile` for a model on a device."""
    if requested == "off":
        return CompileChoice("off", "switched off by FastConfig.compile")
    if requested != "auto":
        return CompileChoice(requested, "asked for by FastConfig.compile")
    parameters = sum(p.numel() for p in module.parameters())
    if parameters < _MIN_PARAMETERS:
        return CompileChoice("off", f"{parameters / 1e6:.0f} M parameters: compiling takes longer than it saves")
    if device.type == "cpu":
        return CompileChoice("off", "takes minutes on cpu and was not yet measured to win there; ask with 'regional'")
    return CompileChoice("regional", f"repeated blocks on {device.type}")


def apply_compilation(model: nn.Module, mode: str) -> int:
    """Compile a UNet, ControlNet or VAE in place. Nothing is compiled before the first call.

    Args:
        mode: `"regional"`: each block class of `_repeated_blocks` is compiled once and serves all its instances.
            `"full"`: the UNet's `denoise`, a ControlNet's `condition` and the VAE's decoder are one graph each.

    Returns:
        The number of compiled regions.
    """
    undo_compilation(model)
    if mode == "full":
        targets = [_whole(model)]
    else:
        targets = [(block, "forward") for block in repeated_blocks(model)]
    regions: dict[tuple, Callable] = {}
    for module, method in targets:
        # `forward` is compiled rather than the call: hooks (the choice of the layer's context, offloading) stay
        # outside of the graph.
        kind = _kind(module)
        if kind not in regions:
            function = _own_code(getattr(type(module), method), len(regions))
            regions[kind] = torch.compile(function, fullgraph=True, dynamic=True if mode == "regional" else None)
        setattr(module, method, MethodType(regions[kind], module))
        module._compiled_method = method
    return len(targets)


def undo_compilation(model: nn.Module) -> None:
    """Take off what `apply_compilation` put on, and nothing else: offloading keeps its own `forward` on modules."""
    for module in model.modules():
        method = module.__dict__.pop("_compiled_method", None)
        module.__dict__.pop(method, None)


def _kind(module: nn.Module) -> tuple:
    """What two blocks must have in common to be served by one graph."""
    weights = tuple((name, p.shape, p.dtype, type(p)) for name, p in module.named_parameters())
    return type(module), weights


def _own_code(function: Callable, number: int) -> Callable:
    """Copy a function so that it has a code object, and a name, of its own.

    The compiler counts graphs, and remembers which sizes have varied, per code object. Blocks of one class with
    weights of other shapes would share that count, pass its limit, and have each other's channels made dynamic.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    copied = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _whole(model: nn.Module) -> tuple[nn.Module, str]:
    for method in ("denoise", "condition"):
        if hasattr(model, method):
            return model, method
    return model.decoder, "forward"


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost blocks of the classes named in `_repeated_blocks`."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in model._repeated_blocks:
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found
