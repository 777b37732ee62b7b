"""The compiler: which regions of UNet and VAE become graphs, and with which options."""

from __future__ import annotations

from dataclasses import dataclass

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
    for module, method in targets:
        # `forward` is compiled rather than the call: hooks (the choice of the layer's context, offloading) stay
        # outside of the graph.
        setattr(module, method, torch.compile(getattr(module, method), fullgraph=True))
        module._compiled_method = method
    return len(targets)


def undo_compilation(model: nn.Module) -> None:
    """Take off what `apply_compilation` put on, and nothing else: offloading keeps its own `forward` on modules."""
    for module in model.modules():
        method = module.__dict__.pop("_compiled_method", None)
        module.__dict__.pop(method, None)


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
