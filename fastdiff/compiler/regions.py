"""Compiled code in its place: what is made uniform before a graph is entered, and where graphs are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..failures import has_failed, note_failure
from ..models.storage import no_view
from .progress import current_progress
from .settings import CompilerSettings

# Graphs that one kind of block may gather: other dtypes, adapters that were loaded and unloaded. The compiler's own
# limit is 8, beyond which a full graph raises.
_MAX_GRAPHS = 64


class Region:
    """Compiled code, and for which inputs it has graphs.

    Args:
        eager: what is compiled: a function whose first argument is the module.
        label: what a person calls it.
    """

    def __init__(self, eager: Callable, label: str, compiled: Callable):
        self.eager, self.label, self.compiled = eager, label, compiled
        self.made: set = set()
        self._failed = False

    def __call__(self, module: nn.Module, *args, **kwargs):
        key = self.graph_of(args[0])
        if self._failed or (key not in self.made and has_failed("compile")):
            return self.eager(module, *args, **kwargs)
        progress = current_progress() if key not in self.made else None
        try:
            with nullcontext() if progress is None else progress.compiling(self.label):
                result = self.compiled(module, *args, **kwargs)
        except Exception as error:
            # What the plain code raises, too, is the caller's mistake.
            result = self.eager(module, *args, **kwargs)
            self._failed = True
            note_failure("compile", error)
            return result
        self.made.add(key)
        return result

    def graph_of(self, sample: torch.Tensor) -> Any:
        """What tells the graphs of this region apart."""
        return sample.shape

    def missing(self, sample: torch.Tensor) -> int:
        """How many graphs a call of the model will make here."""
        return self.graph_of(sample) not in self.made


class SharedRegion(Region):
    """The code of all blocks of one kind: a graph for one sample, and one for several.

    The compiler tells the two apart whatever it is told, because a dimension of 1 has no stride to speak of. All else
    that varies is made uniform before the graph is entered.

    Args:
        channels_last: whether samples are to be in that format.
        stage: made from a module and whether its graph is missing, what it is to be entered in; nothing by default.
    """

    def __init__(
        self,
        eager: Callable,
        label: str,
        compiled: Callable,
        channels_last: bool,
        stage: Callable[[nn.Module, bool], AbstractContextManager] | None = None,
    ):
        super().__init__(eager, label, compiled)
        self._channels_last, self._stage = channels_last, stage
        # An open number, such as an epsilon, is traced, found to be needed as a constant, and all is traced again.
        self._constants = CompilerSettings(torch._dynamo.config, specialize_float=True)

    def __call__(self, module: nn.Module, *args, **kwargs):
        if kwargs.get("cross_attention_kwargs") == {}:
            # What upstream leaves of a LoRA scale.
            kwargs["cross_attention_kwargs"] = None
        args = tuple(map(self._uniform, args))
        kwargs = {name: self._uniform(value) for name, value in kwargs.items()}
        if isinstance(args[-1], torch.Size):
            # An Upsample2D that is told its result's size, because that is odd. The ratio of the sizes would become
            # part of the graph; all that compiling could save here is a call, as a convolution is one either way.
            return self.eager(module, *args, **kwargs)
        return self._enter(module, *args, **kwargs)

    def _enter(self, module: nn.Module, *args, **kwargs):
        # Saved traces are in place of the first one.
        first = self.graph_of(args[0]) not in self.made and not hasattr(self.eager, "has_traces")
        with nullcontext() if self._stage is None else self._stage(module, first):
            # Asked once a graph: it takes longer than many a block.
            with self._constants if first and not _has_scales(module) else nullcontext():
                return super().__call__(module, *args, **kwargs)

    def _uniform(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if self._channels_last and value.ndim == 4:
            # Attention returns its result with channels first, convolutions do not: a graph each without this.
            value = value.contiguous(memory_format=torch.channels_last)
        return no_view(value)

    def graph_of(self, sample: torch.Tensor) -> bool:
        return sample.shape[0] == 1


class Root:
    """The method of a model that the regions run in: sets the stage for compiling, in this thread and call alone.

    Args:
        method: the method itself; its first argument is the module.
        regions: what runs inside of it.
    """

    def __init__(self, method: Callable, regions: Sequence[Region]):
        self._method, self._regions = method, regions
        # With duck shapes, a first picture as wide as high makes one symbol of both, and the second one recompiles.
        shapes = torch.fx.experimental._config
        self._shapes = CompilerSettings(shapes, use_duck_shape=False)
        self._limit = CompilerSettings(torch._dynamo.config, recompile_limit=_MAX_GRAPHS)

    def __call__(self, module: nn.Module, *args, **kwargs):
        progress = current_progress()
        if progress is not None:
            progress.expect(sum(region.missing(args[0]) for region in self._regions))
        with self._shapes, self._limit:
            return self._method(module, *args, **kwargs)


def _has_scales(block: nn.Module) -> bool:
    """Whether a block has numbers that may be others in the next call: those of LoRAs and IP-Adapters."""
    parts = list(block.modules())
    return any(isinstance(part, BaseTunerLayer) or hasattr(getattr(part, "processor", None), "scale") for part in parts)
