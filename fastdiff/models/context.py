"""Cross-attention keys and values, computed once per prompt and reused in every step."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models import attention
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..identity import StandIn
from .storage import no_view

# On CPUs attention over 77 tokens takes up to twice the time of attention over 80: its kernels work in vectors of 16.
_CPU_VECTOR = 16

_STOCK_FORWARD = attention.BasicTransformerBlock.forward
# What stands beside a `forward` of a block that only wraps its own: of our compiler, accelerate, diffusers.
_OWN_FORWARDS = ("_compiled_method", "_hf_hook", "_diffusers_hook")


class ContextKV(NamedTuple):
    """Projected context of one cross-attention layer.

    `key` and `value`: (batch, tokens, heads * head_dim), where tokens may have been rounded up; then `mask`, of
    (1, 1, 1, tokens), is added to the scores and hides what was appended.
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None


class _Entry:
    """Storage for the keys and values of all layers for one shape of context, and what it now holds."""

    def __init__(self, signature: tuple):
        self.signature = signature
        self.storage: tuple[ContextKV, ...] = ()
        self.context: weakref.ref[torch.Tensor] | None = None
        self.state: tuple | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the context that this was projected from is gone."""
        return self.context is None or self.context() is None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kv in self.storage for t in (kv.key, kv.value))


class ContextCache:
    """Keys and values of every cross-attention layer of a UNet or ControlNet for the contexts in use.

    An entry is reused only for the same context tensor (identity), unedited (`_version`), with the same projection
    weights and adapter state. A context without a version counter (made under `torch.inference_mode`), one that
    needs gradients, and layers with a foreign processor are never cached: the caller then passes the context itself
    and attention projects it in each step as stock does. Only edits through `.data` of a tensor that is then passed
    again leave no trace; pipelines build a new context for each call.

    A context whose tensor has died leaves its storage to the next one of the same shape. Of such entries at most
    `MAX_IDLE` are kept, and of all together `MAX_ENTRIES`, oldest out first; an entry in use by another thread is
    dropped from the cache, never overwritten.

    Args:
        blocks: the transformer blocks with cross-attention, in the order of the returned tuple.
        containers: the modules between the model and its blocks. Where the user compiles those, they get the context
            itself, as the number of a layer would become part of their graphs.
    """

    # Prompts in flight at once; with more of them each step would project its context anew.
    MAX_ENTRIES = 16
    MAX_IDLE = 4

    def __init__(self, blocks: list[BasicTransformerBlock], containers: list[nn.Module]):
        self.blocks, self.containers = blocks, containers
        self.layers = [block.attn2 for block in blocks]
        self.enabled = True
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        # A copy makes its own keys and values.
        kept = ("blocks", "containers", "layers", "enabled")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _entries=OrderedDict(), _lock=threading.Lock())

    @property
    def nbytes(self) -> int:
        """Bytes that the cached keys and values occupy."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Free all entries."""
        with self._lock:
            self._entries.clear()

    def project(self, context: torch.Tensor) -> torch.Tensor | tuple[ContextKV, ...]:
        """Return the keys and values of `context` for every layer, from the cache when they are known to be current.

        Args:
            context: `encoder_hidden_states`, (batch, tokens, cross_attention_dim).

        Returns:
            One `ContextKV` a layer, or `context` itself when it cannot be cached.
        """
        if not self.enabled or not self._cacheable(context):
            return context
        with self._lock:
            # The lock is held while projecting: two threads that bring the same context share one computation.
            state = (context._version, *map(_projection_state, self.layers))
            entry = self._find(context)
            if entry.state != state:
                with torch.no_grad():
                    self._fill(entry, context)
                entry.state = state
            return entry.storage

    def _cacheable(self, context: torch.Tensor) -> bool:
        if not self.layers or not isinstance(context, torch.Tensor) or context.is_inference():
            return False
        weights = (p for attn in self.layers for proj in (attn.to_k, attn.to_v) for p in proj.parameters())
        if torch.is_grad_enabled() and (context.requires_grad or any(p.requires_grad for p in weights)):
            return False
        if any(container._compiled_call_impl is not None for container in self.containers):
            return False
        return all(map(_is_plain, self.layers)) and all(map(_takes_keys, self.blocks))

    def _find(self, context: torch.Tensor) -> _Entry:
        signature = _signature(context, self.layers[0])
        for key, entry in self._entries.items():
            # Also the same context on another stream, or cast otherwise, has keys and values of its own.
            if entry.context is not None and entry.context() is context and entry.signature == signature:
                self._entries.move_to_end(key)
                return entry
        for entry in self._entries.values():
            if entry.signature == signature and entry.is_idle:
                break
        else:
            entry = _Entry(signature)
            self._entries[id(entry)] = entry
            idle = [key for key, kept in self._entries.items() if kept is not entry and kept.is_idle]
            live = len(self._entries) - len(idle)
            for key in idle[: len(idle) - max(0, self.MAX_IDLE - live)]:
                del self._entries[key]
            while len(self._entries) > self.MAX_ENTRIES:
                self._entries.popitem(last=False)
        self._entries.move_to_end(id(entry))
        entry.context, entry.state = weakref.ref(context), None
        return entry

    def _fill(self, entry: _Entry, context: torch.Tensor) -> None:
        projected = ((attn.to_k(context), attn.to_v(context)) for attn in self.layers)
        if not entry.storage:
            entry.storage = tuple(_rounded_up(key, value) for key, value in projected)
            return
        tokens = context.shape[1]
        for (key, value), kept in zip(projected, entry.storage, strict=True):
            kept.key[:, :tokens] = key
            kept.value[:, :tokens] = value


def _rounded_up(key: torch.Tensor, value: torch.Tensor) -> ContextKV:
    tokens = key.shape[1]
    extra = appended_tokens(tokens) if key.device.type == "cpu" else 0
    if not extra:
        return ContextKV(key, value)
    mask = key.new_zeros(1, 1, 1, tokens + extra)
    mask[..., tokens:] = -torch.inf
    return ContextKV(F.pad(key, (0, 0, 0, extra)), F.pad(value, (0, 0, 0, extra)), mask)


def appended_tokens(tokens: int) -> int:
    """How many tokens are appended to those of a prompt on CPUs."""
    return -tokens % _CPU_VECTOR


class BasicTransformerBlock(attention.BasicTransformerBlock, metaclass=StandIn):
    """diffusers' block, which picks its own layer's keys and values out of those of all layers.

    It does so outside of compiled code, also of the user's, so that one graph serves all blocks. It has the stock name,
    by which users and diffusers list blocks to compile, and is found under it in this module, as torch asks of a class
    whose traces it saves.
    """

    _replaces = attention.BasicTransformerBlock
    context_index: int

    def compile(self, *args, **kwargs) -> None:
        """As `torch.nn.Module.compile`."""
        super().compile(*args, **kwargs)
        compiled = self.__dict__["_compiled_call_impl"]
        self._compiled_call_impl = functools.partial(self._call_compiled, compiled)

    def _call_compiled(self, compiled: Callable, *args, **kwargs):
        args, kwargs = _select_for_compiled(self, args, kwargs)
        return compiled(*args, **kwargs)


def attach_context_cache(model: nn.Module) -> ContextCache:
    """Build the context cache of a model and let its transformer blocks pick their own layer's keys and values.

    The choice is made in a forward pre-hook of the block, outside of `block.forward`, so that a compiled block sees
    two tensors and the same code serves every layer.
    """
    stock = attention.BasicTransformerBlock
    blocks = [m for m in model.modules() if isinstance(m, stock) and m.attn2 is not None]
    blocks = [block for block in blocks if block.attn2.is_cross_attention]
    for index, block in enumerate(blocks):
        if type(block) is stock:
            block.__class__ = BasicTransformerBlock
            block.context_index = index
            block.register_forward_pre_hook(_select_layer, with_kwargs=True)
    blocks = [block for block in blocks if isinstance(block, BasicTransformerBlock)]
    inside = {id(part) for block in blocks for part in block.modules()} | {id(model)}
    outside = [module for module in model.modules() if id(module) not in inside]
    containers = [m for m in outside if any(isinstance(part, BasicTransformerBlock) for part in m.modules())]
    return ContextCache(blocks, containers)


def select_before_compiled(compiled: nn.Module) -> None:
    """As `BasicTransformerBlock.compile`, for what `torch.compile(block)` returned."""
    block = getattr(compiled, "_orig_mod", None)
    if isinstance(block, BasicTransformerBlock) and "_selects_layer" not in compiled.__dict__:
        compiled.__dict__["_selects_layer"] = compiled.register_forward_pre_hook(_select_for_compiled, with_kwargs=True)


def _select_layer(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    contexts = kwargs.get("encoder_hidden_states")
    # An IP-Adapter brings a tuple too: the text context beside those of the images.
    if type(contexts) is tuple and isinstance(contexts[0], ContextKV):
        kwargs = {**kwargs, "encoder_hidden_states": contexts[block.context_index]}
        return args, kwargs
    return None


def _select_for_compiled(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    _, kwargs = _select_layer(block, args, kwargs) or (args, kwargs)
    return tuple(map(no_view, args)), kwargs  # the first block's input is a view, that of others is not


def _takes_keys(block: BasicTransformerBlock) -> bool:
    """Whether a block does what diffusers' does, and not what somebody put in its place, who expects the context."""
    if type(block).forward is not _STOCK_FORWARD:
        return False
    return "forward" not in block.__dict__ or any(name in block.__dict__ for name in _OWN_FORWARDS)


def _is_plain(attn: Attention) -> bool:
    if attn.norm_cross or not getattr(attn.processor, "accepts_context_kv", False):
        return False
    return not any(_drops_out(proj) or proj.weight.is_inference() for proj in (attn.to_k, attn.to_v))


def _drops_out(proj: nn.Module) -> bool:
    """Whether an adapter draws its dropout anew in each step."""
    if not (isinstance(proj, BaseTunerLayer) and proj.training):
        return False
    return any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in getattr(proj, "lora_dropout", {}).values())


def _signature(context: torch.Tensor, attn: Attention) -> tuple:
    kind = context.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # What another stream still reads, this one must not write to.
    has_streams = kind == "cuda" and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream(context.device).cuda_stream if has_streams else None
    return context.shape, context.device, context.dtype, attn.to_k.weight.dtype, autocast, stream


def _projection_state(attn: Attention) -> tuple:
    """What the keys and values of a layer depend on besides the context: weights and adapters."""
    return tuple(
        (id(proj), proj.weight._version, _adapter_state(proj) if isinstance(proj, BaseTunerLayer) else None)
        for proj in (attn.to_k, attn.to_v)
    )


def _adapter_state(layer: BaseTunerLayer) -> tuple:
    adapters = tuple(layer.active_adapters)
    weights = tuple(
        table[name].weight._version
        for table in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {}))
        for name in adapters
        if name in table
    )
    scaling = tuple(getattr(layer, "scaling", {}).items())
    return adapters, scaling, weights, tuple(layer.merged_adapters), layer.disable_adapters
