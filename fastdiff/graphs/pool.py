"""Keeps graphs: bounded in number and memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from .recording import Recorder, Recording

_MAX_GRAPHS = 16


@dataclass
class Graph:
    """A recording, and the buffers that its arguments are copied into, by their place among the arguments."""

    inputs: list[tuple[int, torch.Tensor]]
    recording: Recording

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes + sum(buffer.numel() * buffer.element_size() for _, buffer in self.inputs)


class GraphPool:
    """The graphs of models that run on one device in turn: bounded in number and memory, least recently used out first.

    Calls from several threads take turns, because they share the buffers.
    """

    def __init__(self, recorder: Recorder, max_graphs: int = _MAX_GRAPHS):
        self.recorder, self.max_graphs = recorder, max_graphs
        self.lock = threading.RLock()
        # None: not to be recorded.
        self._graphs: OrderedDict[tuple, Graph | None] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> GraphPool:
        return self

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the graphs' buffers, results and intermediate values."""
        with self.lock:
            return sum(graph.nbytes for graph in self._graphs.values() if graph is not None)

    def __contains__(self, key: tuple) -> bool:
        return key in self._graphs

    def get(self, key: tuple) -> Graph | None:
        """The graph of a key that is in the pool, None if its function is to be called instead."""
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def add(self, key: tuple, graph: Graph | None) -> None:
        """Keep a graph, or the knowledge that there is to be none, as long as there is room."""
        limit = self.recorder.max_bytes
        if graph is not None and self.nbytes + graph.nbytes > limit:
            # Graphs that share memory give it back together. This one gets its chance in an empty pool, at its next
            # call, unless that is what it just had.
            alone = len(self) == 0
            self._graphs.clear()
            self.recorder.forget()
            if not alone:
                return
            graph = None
        self._graphs[key] = graph
        while len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        self._forget_if_empty()

    def drop(self, owner: int) -> None:
        """Free the graphs of one method; those of others stay."""
        with self.lock:
            for key in [key for key in self._graphs if key[0] == owner]:
                del self._graphs[key]
            self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        if len(self) == 0:
            self.recorder.forget()
