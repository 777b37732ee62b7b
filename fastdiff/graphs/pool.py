"""Keeps graphs: bounded in number and memory, and never recorded over and over."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from .recording import Recorder, Recording

_MAX_GRAPHS = 64
# Calls of the pool's models after which a graph that none of them used makes room for another: some pictures. What
# is in use in turn stays; recording takes as long as three calls, so that at most one in eighty is spent on it.
_PATIENCE = 256


class LastingArguments:
    """Buffers for arguments that seldom change: written to only when what they were last given has changed.

    Args:
        tensors: gives the buffers their shapes.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        self.buffers = [torch.empty_like(tensor) for tensor in tensors]
        self._seen: list[tuple] = [(lambda: None, -1)] * len(tensors)

    def fill(self, tensors: list[torch.Tensor]) -> None:
        """Copy those tensors that are others than last time, or have been written to since."""
        changed = []
        for index, (tensor, (known, version)) in enumerate(zip(tensors, self._seen, strict=True)):
            # Not by address, which a tensor that has died may leave to another one.
            if known() is not tensor or tensor._version != version:
                self._seen[index] = weakref.ref(tensor), tensor._version
                changed.append(index)
        if changed:
            torch._foreach_copy_([self.buffers[i] for i in changed], [tensors[i] for i in changed])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)


@dataclass
class Graph:
    """A recording, and the buffers that its arguments are copied into.

    Attributes:
        inputs: buffers by their place among the arguments.
        lasting: buffers of the arguments that seldom change, shared with other graphs.
        used: when it was last used, in calls of the pool's models.
    """

    inputs: list[tuple[int, torch.Tensor]]
    lasting: LastingArguments
    recording: Recording
    used: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that this graph holds alone."""
        return self.recording.nbytes + sum(buffer.nbytes for _, buffer in self.inputs)


@dataclass
class _Refused:
    """There is to be no graph: for good, or until there may be room."""

    until: float = field(default=float("inf"))


class GraphPool:
    """The graphs of models that run on one device in turn.

    A graph that does not fit beside those in use is not kept, and its function called instead, so that what is in use
    in turn is recorded once and no more. Calls from several threads take turns, because they share the buffers.

    Args:
        max_graphs: how many to keep.
        patience: number of calls after which a graph that was not used makes room.
    """

    def __init__(self, recorder: Recorder, max_graphs: int = _MAX_GRAPHS, patience: int = _PATIENCE):
        self.recorder, self.max_graphs, self.patience = recorder, max_graphs, patience
        self.lock = threading.RLock()
        self._graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self._refused: dict[tuple, _Refused] = {}
        self._lasting: weakref.WeakValueDictionary[tuple, LastingArguments] = weakref.WeakValueDictionary()
        self._calls = 0
        # Of graphs that were not kept: their memory returns with that of the last graph.
        self._unused_bytes = 0

    def __deepcopy__(self, memo: dict) -> GraphPool:
        return self

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of the graphs' buffers, results and intermediate values."""
        with self.lock:
            lasting = {id(graph.lasting): graph.lasting.nbytes for graph in self._graphs.values()}
            return sum(graph.nbytes for graph in self._graphs.values()) + sum(lasting.values()) + self._unused_bytes

    def get(self, key: tuple) -> Graph | None:
        """The graph of a key; None if there is none yet, or is to be none."""
        self._calls += 1
        graph = self._graphs.get(key)
        if graph is not None:
            graph.used = self._calls
            self._graphs.move_to_end(key)
        return graph

    def may_record(self, key: tuple) -> bool:
        """Whether a graph of a key may find room."""
        refused = self._refused.get(key)
        if refused is None or refused.until > self._calls:
            return refused is None
        del self._refused[key]
        return True

    def lasting(self, key: tuple, tensors: list[torch.Tensor]) -> LastingArguments:
        """Buffers for arguments that seldom change, the same for all graphs that bring the same key."""
        found = self._lasting.get(key)
        if found is None:
            found = self._lasting[key] = LastingArguments(tensors)
        return found

    def refuse(self, key: tuple) -> None:
        """Keep in mind that recording failed."""
        self._refused[key] = _Refused()

    def add(self, key: tuple, graph: Graph) -> None:
        """Keep a graph if there is room, or can be made by giving up some that are no longer in use."""
        graph.used = self._calls
        idle = [key for key, kept in self._graphs.items() if self._calls - kept.used > self.patience]
        if self._has_room(graph):
            self._graphs[key] = graph
            return
        if not self._graphs:
            # Alone, and too large.
            self.refuse(key)
        elif len(idle) == len(self._graphs):
            # Graphs that share memory give it back together. This one gets its chance in an empty pool.
            self._graphs.clear()
        else:
            for each in idle:
                del self._graphs[each]
            self._unused_bytes += graph.recording.nbytes
            self._refused[key] = _Refused(until=self._calls + (1 if idle else self.patience))
        self._forget_if_empty()

    def _has_room(self, graph: Graph) -> bool:
        fits = self.nbytes + graph.nbytes + graph.lasting.nbytes <= self.recorder.max_bytes
        return fits and len(self._graphs) < self.max_graphs

    def drop(self, owner: int) -> None:
        """Free the graphs of one method; those of others stay."""
        with self.lock:
            for table in (self._graphs, self._refused):
                for key in [key for key in table if key[0] == owner]:
                    del table[key]
            self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        if not self._graphs:
            self._unused_bytes = 0
            self.recorder.forget()


def flat_tensors(values: list[Any]) -> list[torch.Tensor]:
    """The tensors of tuples that may hold None, one after the other."""
    return [tensor for value in values for tensor in value if tensor is not None]
