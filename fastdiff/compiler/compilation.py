"""The compiler: which regions of UNet and VAE become graphs, and with which options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from .channels import OpenChannels, open_kind, open_options, shares_graphs
from .regions import Region, Root, SharedRegion

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
        return CompileChoice("off", "packed weights are faster on cpu, and need no compiler; ask with 'regional'")
    return CompileChoice("regional", f"repeated blocks on {device.type}")


def inductor_options(device: str, mode: str) -> dict[str, Any]:
    """The options that the compiler gets for a device, beside its defaults.

    Args:
        device: type of the device, such as `"cuda"`.
        mode: `"regional"` or `"full"`.

    Returns:
        Options of `torch.compile`. On CPU none: what the documented recipe sets is for Triton, and freezing would
        make constants of weights, which merging a LoRA or quantizing writes to, and of the cached context.
    """
    if device != "cuda":
        return {}
    options = {
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }
    # A whole graph is tuned as "max-autotune" does, without its tables on the console.
    return options if mode == "regional" else {**options, "max_autotune": True, "autotune_num_choices_displayed": 0}


def apply_compilation(model: nn.Module, mode: str, device: str | None = None) -> int:
    """Compile a UNet, ControlNet or VAE in place. Nothing is compiled before the first call.

    Args:
        mode: `"regional"`: each kind of block of `region_names()` is compiled once and serves all its instances, at
            any size, number of samples and length of prompt, and on CPUs of any number of channels. `"full"`: the
            UNet's `denoise`, a ControlNet's `condition` and the VAE's decoder are one graph each, for the sizes of the
            first call.
        device: type of the device that the model will run on; by default where it is.

    Returns:
        The number of compiled regions.
    """
    undo_compilation(model)
    device = device or next(model.parameters()).device.type
    options = inductor_options(device, mode)
    if mode == "full":
        root, method = _roots(model)[0]
        function = _own_code(getattr(type(root), method), 0)
        compiled = torch.compile(function, fullgraph=True, options=options or None)
        region = Region(function, type(model).__name__, compiled)
        _install(root, method, Root(region, [region]))
        return 1
    regions: dict[tuple, SharedRegion] = {}
    blocks, opened = repeated_blocks(model), OpenChannels()
    block: Any
    for block in blocks:
        if hasattr(block, "output_scale_factor"):
            # A factor of 1 is the same as one of 1.0, but not to the compiler.
            block.output_scale_factor = float(block.output_scale_factor)
        # `forward` is compiled rather than the call: hooks (the choice of the layer's context, offloading) stay
        # outside of the graph.
        kind = _kind(block, device)
        if kind not in regions:
            function = _own_code(type(block).forward, len(regions))
            is_open = shares_graphs(block, device)
            settings = {**options, **(open_options() if is_open else {})}
            compiled = torch.compile(function, fullgraph=True, dynamic=True, options=settings or None)
            label = type(block).__name__ if is_open else _label(block)
            stage = opened if is_open else None
            regions[kind] = SharedRegion(function, label, compiled, _is_channels_last(block), stage)
        _install(block, "forward", regions[kind])
    for root, method in _roots(model):
        inside = [regions[kind] for kind in _kinds_inside(blocks, root, device)]
        _install(root, method, Root(getattr(type(root), method), inside))
    return len(blocks)


def undo_compilation(model: nn.Module) -> None:
    """Take off what `apply_compilation` put on, and nothing else: offloading keeps its own `forward` on modules."""
    for module in model.modules():
        method = module.__dict__.pop("_compiled_method", None)
        module.__dict__.pop(method, None)


def compiled_by_user(component: Any) -> str | None:
    """How a component was compiled by somebody else than `apply_compilation`, or None."""
    if is_compiled_module(component):
        return f"torch.compile() of {type(component._orig_mod).__name__}"
    if not isinstance(component, nn.Module):
        return None
    name = type(component).__name__
    if component._compiled_call_impl is not None:
        return f"{name}.compile()"
    for method in ("encode", "decode"):
        if method in component.__dict__:
            return f"{name}.{method}"
    blocks = [m for m in component.modules() if m._compiled_call_impl is not None or is_compiled_module(m)]
    return f"{len(blocks)} blocks of {name}" if blocks else None


def expect_new_graphs(model: nn.Module) -> None:
    """Have progress shown again where a compiled model may need other graphs, as after loading an adapter."""
    for module in model.modules():
        installed = module.__dict__.get(module.__dict__.get("_compiled_method", ""))
        # Something else may have wrapped it since.
        if isinstance(region := getattr(installed, "__func__", None), Region):
            region.made.clear()


def _install(module: Any, method: str, function: Callable) -> None:
    setattr(module, method, MethodType(function, module))
    module._compiled_method = method


def _roots(model: Any) -> list[tuple[nn.Module, str]]:
    """Where a model's work is done, the first being what full-graph compilation takes."""
    for method in ("denoise", "condition"):
        if hasattr(model, method):
            return [(model, method)]
    return [(model.decoder, "forward"), (model.encoder, "forward")]


def _kind(module: nn.Module, device: str) -> tuple:
    """What two blocks must have in common to be served by one graph on a device."""
    if shares_graphs(module, device):
        weights = open_kind(module)
    else:
        weights = tuple((name, p.shape, p.dtype, type(p)) for name, p in module.named_parameters())
    return type(module), float(getattr(module, "output_scale_factor", 1)), weights


def _kinds_inside(blocks: list[nn.Module], part: nn.Module, device: str) -> list[tuple]:
    inside = set(part.modules())
    return list(dict.fromkeys(_kind(block, device) for block in blocks if block in inside))


def _label(block: nn.Module) -> str:
    matrices = [p for p in block.parameters() if p.ndim > 1]
    return f"{type(block).__name__} {matrices[0].shape[1]}->{matrices[-1].shape[0]}"


def _is_channels_last(block: nn.Module) -> bool:
    weights = [p for p in block.parameters() if p.ndim == 4 and p.shape[2] > 1]
    return bool(weights) and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def _own_code(function: Callable, number: int) -> Callable:
    """Copy a function so that it has a code object, and a name, of its own.

    The compiler counts graphs, and remembers which sizes have varied, per code object. Blocks of one class with
    weights of other shapes would share that count, pass its limit, and have each other's channels made dynamic.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    copied = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def repeated_blocks(model: Any) -> list[nn.Module]:
    """The outermost blocks of the classes that a model names."""
    found: list[nn.Module] = []
    names = model.region_names()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in names:
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def region_kinds(model: nn.Module, part: nn.Module | None = None, device: str | None = None) -> int:
    """How many kinds of repeated blocks a model has, or a part of it; each is compiled once.

    Args:
        device: type of the device that the model will run on; by default where it is.
    """
    device = device or next(model.parameters()).device.type
    return len(_kinds_inside(repeated_blocks(model), part or model, device))
