"""GroupNorm in compiled regions on CUDA: one operator that keeps channels_last, together with the SiLU that follows.

With symbolic sizes the compiler writes the result of a GroupNorm in NCHW, has a second kernel transpose it for the next
convolution, and makes seven kernels of it for each kind of block. The operator's are four for all of them. Removable
once generated code reads statistics along the channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..models.group_norm import define_operator


class ChannelsLastNorms(CustomGraphPass):
    """Puts our operator in the place of GroupNorms, and of SiLUs that nothing else comes between."""

    def __call__(self, graph: fx.Graph) -> None:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            # It has no gradients, and no rule for autocast.
            return
        operator = define_operator()
        for node in graph.find_nodes(op="call_function", target=F.group_norm):
            given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), node.args, strict=False)) | node.kwargs
            if not _is_channels_last(given["input"].meta.get("example_value")):
                continue
            silu = _only_user(node)
            with graph.inserting_before(node):
                arguments = (
                    given["input"], given["num_groups"], given.get("weight"), given.get("bias"),
                    given.get("eps", 1e-5), silu is not None,
                )  # fmt: skip
                ours = graph.call_function(operator, arguments)
            ours.meta.update(node.meta)
            for old in (silu, node):
                if old is not None:
                    old.replace_all_uses_with(ours)
                    graph.erase_node(old)

    def uuid(self) -> bytes:
        """What the compiler's caches tell passes apart by."""
        return get_hash_for_files((__file__,))


def _only_user(norm: fx.Node) -> fx.Node | None:
    users = list(norm.users)
    return users[0] if len(users) == 1 and users[0].target is F.silu else None


def _is_channels_last(x: torch.Tensor | None) -> bool:
    if x is None or x.ndim < 3:
        return False
    step = x.shape[1]
    for dimension in range(x.ndim - 1, 1, -1):
        if not statically_known_true(x.stride(dimension) == step):
            return False
        step = step * x.shape[dimension]
    return statically_known_true(x.stride(1) == 1)
