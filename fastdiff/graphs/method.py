"""CUDA graphs: a model's whole step, recorded once for each kind of arguments, then replayed with a single launch.

`GraphedMethod` takes the place of a method on one module. It copies the arguments into buffers that keep their
address, replays, and hands out copies of the results. What it cannot record, or does not know to be safe, it calls as
it is. What is CUDA about it is in `recording.CudaRecorder` alone; the rest runs, and is tested, on any device.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..failures import has_failed, note_failure
from .pool import Graph, GraphPool, flat_tensors
from .recording import capturing
from .wiring import Wiring

_PLAIN = (type(None), bool, int, float, str)


class GraphedMethod:
    """Stands in for a method of one module; replays it where it can.

    Args:
        module: has the method, and the weights that it uses.
        name: of the method.
        pool: keeps the graphs.
        lasting: tuple type of arguments whose tensors seldom change between calls, and are copied when they have.
            Other tensors are copied in every call.
    """

    _owners = itertools.count()

    def __init__(self, module: nn.Module, name: str, pool: GraphPool, lasting: type[tuple]):
        self.module, self.name, self.pool, self.lasting = module, name, pool, lasting
        # Compiled code, for example, which `remove_graphs` puts back.
        self.replaced = module.__dict__.get(name)
        self._owner, self._failed = next(self._owners), False
        self._wiring: Wiring | None = None

    def __deepcopy__(self, memo: dict) -> GraphedMethod:
        twin = copy.copy(self)
        twin.module, twin.replaced = copy.deepcopy(self.module, memo), copy.deepcopy(self.replaced, memo)
        twin._owner, twin._wiring = next(self._owners), None
        return twin

    def __call__(self, *args, **kwargs):
        """Call the method, whose results are the caller's own."""
        # A graph holds no derivatives, and a compiler cannot look into it.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._failed or has_failed("cuda_graphs"):
            return self._function(*args, **kwargs)
        # Inference tensors could not be written to later, outside of inference mode.
        with self.pool.lock, torch.inference_mode(False), torch.no_grad():
            try:
                found, result = self._by_graph(args, kwargs)
            except Exception as error:
                # What the plain function raises, too, is the caller's mistake.
                found, result = True, self._function(*args, **kwargs)
                self._give_up(error)
        return result if found else self._function(*args, **kwargs)

    def _by_graph(self, args: tuple, kwargs: dict) -> tuple[bool, Any]:
        """Whether a graph gives the result, or the first call for one, and the result."""
        leaves, structure = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, self.lasting))
        key = self._key(leaves, structure)
        if key is None:
            return False, None
        graph = self.pool.get(key)
        if graph is not None:
            return True, self._replay(graph, leaves)
        if not self.pool.may_record(key):
            return False, None
        return True, self._first_call(key, leaves, structure)

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
        if isinstance(leaf, self.lasting):
            tensors = [t for t in leaf if t is not None]
            # Inference tensors do not tell when they are written to.
            if any(t.device != device or t.is_inference() for t in tensors):
                return None
            return tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if isinstance(leaf, torch.Tensor):
            return (leaf.shape, leaf.stride(), leaf.dtype) if leaf.device == device else None
        return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else None

    def _first_call(self, key: tuple, leaves: list, structure) -> Any:
        recorder, tuples = self.pool.recorder, self._lasting_among(leaves)
        with recorder.exclusive():
            kinds = tuple(self._kind(each, recorder.device) for each in tuples)
            lasting = self.pool.lasting((self._owner, kinds), flat_tensors(tuples))
            lasting.fill(flat_tensors(tuples))
            buffers = [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in leaves]
            spread = iter(lasting.buffers)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, self.lasting):
                    kind: Any = type(leaf)
                    buffers[index] = kind(*(None if t is None else next(spread) for t in leaf))

            def run() -> Any:
                # Lists are made anew each time: the model may empty those that it is given.
                args, kwargs = tree_unflatten(buffers, structure)
                return self._function(*args, **kwargs)

            result = recorder.warm_up(run)
            inputs = [(i, buffers[i]) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            try:
                with capturing:
                    recording = recorder.record(run)
            except Exception as error:
                self.pool.refuse(key)
                self._give_up(error)
                return result
        self.pool.add(key, Graph(inputs, lasting, recording))
        return result

    def _lasting_among(self, leaves: list) -> list:
        return [leaf for leaf in leaves if isinstance(leaf, self.lasting)]

    def _replay(self, graph: Graph, leaves: list) -> Any:
        with self.pool.recorder.exclusive():
            graph.lasting.fill(flat_tensors(self._lasting_among(leaves)))
            for index, buffer in graph.inputs:
                buffer.copy_(leaves[index])
            graph.recording.replay()
            return tree_map_only(torch.Tensor, torch.clone, graph.recording.outputs)

    def _give_up(self, error: Exception) -> None:
        """Record nothing any more, replay nothing any more."""
        self._failed = True
        self.clear()
        note_failure("cuda_graphs", error)
