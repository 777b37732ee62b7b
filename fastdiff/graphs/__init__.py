"""CUDA graphs: a model's whole step recorded once for each kind of arguments, then replayed with one launch.

May import `models`.
"""

from .apply import apply_graphs, graph_pools, graphed_methods, remove_graphs, why_no_graphs
from .method import GraphedMethod
from .pool import GraphPool
from .recording import CudaRecorder

__all__ = [
    "CudaRecorder",
    "GraphPool",
    "GraphedMethod",
    "apply_graphs",
    "graph_pools",
    "graphed_methods",
    "remove_graphs",
    "why_no_graphs",
]
