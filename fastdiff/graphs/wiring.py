"""What a recorded step depends on besides its arguments: which modules and weights there are, and how they are set.

A replay runs no Python. It is right as long as the Python would take the same way through the same addresses; here is
how one sees that. On SDXL's UNet a look takes about a millisecond of the host's time, while the device is busy.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.storage import leaves

_FREEU = ("s1", "s2", "b1", "b2")


class Wiring:
    """The modules and tensors inside of a module as they are now, and whether they still are.

    Hooks of the module itself are outside of what gets recorded, and do not count.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        inner = [m for m in module.modules() if m is not module]
        self._inner = [(m.__dict__, m._forward_hooks, m._forward_pre_hooks) for m in inner]
        tables = [table for m in (module, *inner) for table in (m._modules, m._parameters, m._buffers) if table]
        # The values are held, so that their ids are not given to others.
        self._tables = [(table, list(table.values())) for table in tables]
        self._ids = [(table, [id(value) for value in values]) for table, values in self._tables]
        tensors = [value for _, values in self._tables for value in values if isinstance(value, torch.Tensor)]
        self._leaves = [leaf for tensor in tensors for leaf in leaves(tensor)]
        self._addresses = [leaf.data_ptr() for leaf in self._leaves]
        self._attentions = [m for m in inner if isinstance(m, Attention)]
        self._tuners = [m for m in inner if isinstance(m, BaseTunerLayer)]
        self._freeu_blocks = list(getattr(module, "up_blocks", ()))

    def is_current(self) -> bool:
        """Whether the same modules hold the same tensors at the same addresses."""
        for table, ids in self._ids:
            if [id(value) for value in table.values()] != ids:
                return False
        return [leaf.data_ptr() for leaf in self._leaves] == self._addresses

    def settings(self) -> tuple | None:
        """How the modules are set, hashable; None if something in them may do another thing each time.

        That is so with offloading, with hooks of others, and with attention processors that have a state of their own
        (IP-Adapters, processors that collect attention maps).
        """
        if self._module.training:
            return None
        for attributes, after, before in self._inner:
            if after or "_hf_hook" in attributes or "_diffusers_hook" in attributes:
                return None
            if before and not all(_is_own(hook) for hook in before.values()):
                return None
        processors = []
        for attn in self._attentions:
            state = dict(attn.processor.__dict__)
            backend = state.pop("_attention_backend", None)
            kernels = tuple(state.pop("kernels", {}).items())
            if state:
                return None
            processors.append((type(attn.processor), backend, kernels))
        freeu = tuple(getattr(block, name, None) for block in self._freeu_blocks for name in _FREEU)
        return getattr(self._module, "revision", 0), tuple(processors), freeu, tuple(map(_tuner_state, self._tuners))


def _is_own(hook) -> bool:
    return getattr(hook, "__module__", "").partition(".")[0] == __package__.partition(".")[0]


def _tuner_state(layer: BaseTunerLayer) -> tuple:
    scaling = tuple(getattr(layer, "scaling", {}).items())
    return tuple(layer.active_adapters), scaling, tuple(layer.merged_adapters), layer.disable_adapters
