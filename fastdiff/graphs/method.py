"""CUDA graphs: a model's whole step, recorded once for each kind of arguments, then replayed with a single launch.

`GraphedMethod` takes the place of a method on one module. It copies the arguments into buffers that keep their
address, replays, and hands out copies of the results. What it cannot record, or does not know to be safe, it calls as
it is. What is CUDA about it is in `recording.CudaRecorder` alone; the rest runs, and is tested, on any device.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .pool import Graph, GraphPool
from .wiring import Wiring, addresses

_PLAIN = (type(None), bool, int, float, str)


class GraphedMethod:
    """Stands in for a method of one module; replays it where it can.

    Args:
        module: has the method, and the weights that it uses.
        name: of the method.
        pool: keeps the graphs.
        by_address: tuple type of arguments whose tensors keep their address between calls and are used where they
            are. Other tensors are copied.
    """

    _owners = itertools.count()

    def __init__(self, module: nn.Module, name: str, pool: GraphPool, by_address: type[tuple]):
        self.module, self.name, self.pool, self.by_address = module, name, pool, by_address
        # Compiled code, for example, which `remove_graphs` puts back.
        self.replaced = module.__dict__.get(name)
        self._owner, self._has_warned = next(self._owners), False
        self._wiring: Wiring | None = None

    def __deepcopy__(self, memo: dict) -> GraphedMethod:
        twin = copy.copy(self)
        twin.module, twin.replaced = copy.deepcopy(self.module, memo), copy.deepcopy(self.replaced, memo)
        twin._owner, twin._wiring = next(self._owners), None
        return twin

    def __call__(self, *args, **kwargs):
        """Call the method, whose results are the caller's own."""
        # A graph holds no derivatives, and a compiler cannot look into it.
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            # Inference tensors could not be written to later, outside of inference mode.
            with self.pool.lock, torch.inference_mode(False), torch.no_grad():
                leaves, structure = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, self.by_address))
                key = self._key(leaves, structure)
                if key is not None and key not in self.pool:
                    return self._first_call(key, leaves, structure)
                graph = self.pool.get(key) if key is not None else None
                if graph is not None:
                    return self._replay(graph, leaves)
        return self._function(*args, **kwargs)

    def clear(self) -> None:
        """Free the graphs; they are recorded again when needed."""
        with self.pool.lock:
            self._wiring = None
            self.pool.drop(self._owner)

    @property
    def _function(self) -> Callable:
        return self.replaced or MethodType(getattr(type(self.module), self.name), self.module)

    def _key(self, leaves: list, structure) -> tuple | None:
        """What has to be equal for a graph to be replayed; None for a call that is not to be recorded."""
        device = self.pool.recorder.device
        if torch.is_autocast_enabled(device.type):
            return None
        kinds = [self._kind(leaf, device) for leaf in leaves]
        if None in kinds:
            return None
        if self._wiring is None or not self._wiring.is_current():
            self.clear()
            self._wiring = Wiring(self.module)
        settings = self._wiring.settings()
        return None if settings is None else (self._owner, structure, tuple(kinds), settings)

    def _kind(self, leaf: Any, device: torch.device) -> tuple | None:
        if isinstance(leaf, self.by_address):
            return tuple((*addresses(t), t.shape, t.stride(), t.dtype) for t in leaf if t is not None)
        if isinstance(leaf, torch.Tensor):
            return (leaf.shape, leaf.stride(), leaf.dtype) if leaf.device == device else None
        return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else None

    def _first_call(self, key: tuple, leaves: list, structure) -> Any:
        buffers = [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in leaves]

        def run() -> Any:
            # Lists are made anew each time: the model may empty those that it is given.
            args, kwargs = tree_unflatten(buffers, structure)
            return self._function(*args, **kwargs)

        recorder = self.pool.recorder
        with recorder.exclusive():
            # What this raises is the caller's mistake, or the model's, as without graphs.
            result = recorder.warm_up(run)
            try:
                inputs = [(i, buffers[i]) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
                graph = Graph(inputs, recorder.record(run))
            except Exception as error:
                graph = None
                self._warn(error)
        self.pool.add(key, graph)
        return result

    def _replay(self, graph: Graph, leaves: list) -> Any:
        with self.pool.recorder.exclusive():
            for index, buffer in graph.inputs:
                buffer.copy_(leaves[index])
            graph.recording.replay()
            return tree_map_only(torch.Tensor, torch.clone, graph.recording.outputs)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            what = f"{type(self.module).__qualname__}.{self.name}"
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{what} runs without a CUDA graph, because recording one failed ({reason}). Results are right; "
                "FastConfig(cuda_graphs=False) saves the attempt.",
                RuntimeWarning,
                stacklevel=2,
            )
