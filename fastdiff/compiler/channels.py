"""One graph for all blocks of a class, however many channels they have: on CPUs, where compiling takes longest.

SDXL's UNet has 11 kinds of ResNet block that differ in their channels alone. Generating and building code for each
takes a CPU with two cores most of a minute, and the code differs in a few constants. With the channels left open they
share two graphs, with and without a shortcut. On GPUs kernels are tuned for their channels, and stay apart.

The default does not compile on CPUs, where packed weights are faster. This is for those who ask for `"regional"` there,
and for the tests, which compile on CPUs alone: the full-size UNet has 6 kinds of blocks in place of 18 and took 17 s to
compile in place of 74 s, and the embedded models have 15 in place of 23.

The code generator fixes the channels of what it knows as a convolution, and takes long over a GroupNorm whose channels
are open. Both are one call into a library on a CPU, fused with nothing: so it is given them as operators that it does
not know. Removable once it takes convolutions of open channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .settings import CompilerSettings

_CLASSES = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_NAMESPACE = "fastdiff"


def shares_graphs(block: nn.Module, device: str) -> bool:
    """Whether a block is served by one graph together with others that have other channels.

    Args:
        device: type of the device that it will run on.
    """
    if device != "cpu" or type(block).__name__ not in _CLASSES:
        return False
    return not any(isinstance(module, BaseTunerLayer) for module in block.modules())


def open_kind(block: nn.Module) -> tuple:
    """What blocks have in common that differ at most in their channels."""
    # Such as how a ResNet block uses the time embedding.
    options = {name: value for name, value in vars(block).items() if not name.startswith("_")}
    chosen = tuple((name, value) for name, value in options.items() if isinstance(value, str | bool))
    return chosen, tuple((name, p.ndim, p.shape[2:], p.dtype, type(p)) for name, p in block.named_parameters())


class OpenChannels:
    """The compiler's settings while it traces and runs blocks of open channels, in this thread alone."""

    def __init__(self):
        self._settings = CompilerSettings(
            torch._dynamo.config,
            force_parameter_static_shapes=False,
            force_nn_module_property_static_shapes=False,
            # Samplers compare their input's channels with a number of their own.
            allow_unspec_int_on_nn_module=True,
        )

    @contextmanager
    def __call__(self, block: nn.Module, first: bool) -> Iterator[None]:
        """Enter before `block` runs; `first` if there is no graph for it yet."""
        marked = _mark_fixed(block) if first else []
        try:
            with self._settings:
                yield
        finally:
            for parameter in marked:
                # Saved traces do not know marks, and would not take a parameter that has one.
                for mark in ("_dynamo_static_indices", "_has_dynamo_dim_marking"):
                    parameter.__dict__.pop(mark, None)


def _mark_fixed(block: nn.Module) -> list[nn.Parameter]:
    """Mark for the compiler what does not differ between blocks; returns what has marks now, and had none."""
    marked = []
    for name, parameter in block.named_parameters():
        # The sizes of kernels, and of the time embedding.
        fixed = (2, 3) if parameter.ndim == 4 else (1,) if name == "time_emb_proj.weight" else ()
        if fixed and not hasattr(parameter, "_dynamo_static_indices"):
            marked.append(parameter)
            for dimension in fixed:
                torch._dynamo.mark_static(parameter, dimension)
    return marked


def open_options() -> dict[str, CustomGraphPass]:
    """Options of `torch.compile` for blocks of open channels."""
    _define_operators()
    return {"pre_grad_custom_pass": _LeaveOpen()}


class _LeaveOpen(CustomGraphPass):
    """Puts operators that the code generator does not know in the place of convolutions and GroupNorms."""

    def __call__(self, graph: fx.Graph) -> None:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            # They have no gradients, and no rule for autocast: the channels are fixed then, and graphs made for each.
            return
        ours = getattr(torch.ops, _NAMESPACE)
        for node in graph.find_nodes(op="call_function", target=torch.conv2d):
            if len(node.args) == 7:
                node.target = ours.conv2d.default
        for node in graph.find_nodes(op="call_function", target=F.group_norm):
            if len(node.args) == 5:
                node.target = ours.group_norm.default

    def uuid(self) -> bytes:
        """What the compiler's caches tell passes apart by."""
        return get_hash_for_files((__file__,))


@functools.cache
def _define_operators() -> None:
    exact = (torch.Tag.needs_exact_strides,)
    weights = "Tensor x, Tensor weight, Tensor? bias"
    for name, schema, run, describe in (
        ("conv2d", f"({weights}, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
         torch.conv2d, torch.conv2d),
        ("group_norm", "(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
         torch.group_norm, lambda x, *_: torch.empty_like(x)),
    ):  # fmt: skip
        name = f"{_NAMESPACE}::{name}"
        torch.library.define(name, schema, tags=exact)
        torch.library.impl(name, "CompositeExplicitAutograd")(run)
        torch.library.register_fake(name)(describe)
