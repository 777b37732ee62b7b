"""What makes every fast model an ordinary class: made, copied, pickled and compiled as a stock one is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate.hooks import AlignDevicesHook
from diffusers.hooks.layerwise_casting import _is_layerwise_casting_active
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from ..identity import StandIn
from .attention import apply_fusion, convert_attention
from .context import select_before_compiled
from .form import give_up_forms
from .processor import FusedQKVAttnProcessor
from .projections import FusedProjectionsMixin


class FastModelMixin(FusedProjectionsMixin, metaclass=StandIn):
    """Mixed in before a stock model class, whose constructor is to end in `_make_fast`."""

    # Class names of the blocks that fastdiff compiles; `_repeated_blocks` are those of diffusers' own method.
    _regions: tuple[str, ...] = ()

    def region_names(self) -> list[str] | tuple[str, ...]:
        """The blocks to compile one by one: the user's own `_repeated_blocks`, where there is one, or else ours."""
        named: Any = next(cls for cls in type(self).__mro__ if "_regions" in cls.__dict__)
        return self._regions if self._repeated_blocks is named._repeated_blocks else self._repeated_blocks

    @staticmethod
    def shares_weights_with() -> nn.Module | None:
        """The stock model that still has the same weights, or None; an instance from `from_stock` has its own."""
        return None

    def _make_fast(self) -> None:
        """Turn the modules of a stock model into fast ones; what has been done already is left."""
        convert_attention(self, FusedQKVAttnProcessor())

    def prepare_call(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace arguments by what can be looked up outside of compiled code."""
        return args, kwargs

    def compile(self, *args, **kwargs) -> None:
        """As `torch.nn.Module.compile`; what does not change between steps stays outside of the compiled code."""
        super().compile(*args, **kwargs)
        compiled = self.__dict__["_compiled_call_impl"]
        self._compiled_call_impl = functools.partial(self._call_compiled, compiled)

    def _call_compiled(self, compiled: Callable, *args, **kwargs):
        args, kwargs = self.prepare_call(args, kwargs)
        return compiled(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True):
        """As upstream; what is to be trained are plain weights."""
        if requires_grad:
            give_up_forms(self)
        return super().requires_grad_(requires_grad)

    def enable_layerwise_casting(self, *args, **kwargs) -> None:
        """As upstream. Projections are separate from then on, as it casts each layer on its own."""
        apply_fusion(self, False)
        super().enable_layerwise_casting(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate begins to move single layers, which it finds by the keys of the state dict: the stock ones.
        if name == "_hf_hook" and any(isinstance(hook, AlignDevicesHook) for hook in getattr(value, "hooks", [value])):
            give_up_forms(self)
            apply_fusion(self, False)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        # A copy, or what is read from a file, shares its weights with nobody.
        state = super().__getstate__()
        state.pop("shares_weights_with", None)
        return state


def hoist(look_up: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a denoiser's call with timestep and context as `look_up(sample, timestep, context)` has them."""
    names = ("sample", "timestep", "encoder_hidden_states")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    if any(name not in call for name in names):
        return args, kwargs  # the model knows which error to raise
    call["timestep"], call["encoder_hidden_states"] = look_up(*(call[name] for name in names))
    first = min(len(args), len(names))
    changed = tuple(call.pop(name) for name in names[:first])
    return (*changed, *args[first:]), call


def prepare_compiled(component: nn.Module) -> None:
    """Have what `torch.compile` made of a fast model, or of its blocks, get its arguments looked up before.

    Alone, a compiled model is one graph from the prompt and the timestep on. In a fast pipeline both are looked up
    outside of it; and one graph serves all blocks. To be called again when something may have been compiled since.
    """
    model = unwrapped(component)
    if not isinstance(model, FastModelMixin):
        return
    if component is not model and "_prepares_calls" not in component.__dict__:
        component.__dict__["_prepares_calls"] = component.register_forward_pre_hook(_prepare, with_kwargs=True)
    for module in model.modules():
        if is_compiled_module(module):
            select_before_compiled(module)


def casts_layerwise(model: nn.Module) -> bool:
    """Whether diffusers casts each layer of a model on its own before and after it runs."""
    return _is_layerwise_casting_active(model)


def unwrapped(component: Any) -> Any:
    """The model itself, where a component is what `torch.compile(model)` returned."""
    return component._orig_mod if is_compiled_module(component) else component


def compiled_as(component: nn.Module, model: FastModelMixin) -> nn.Module:
    """Compile a fast model with the options of a stock component, if that is what `torch.compile` returned."""
    if not is_compiled_module(component):
        return model
    compiled = type(component)(model, component.dynamo_ctx)
    prepare_compiled(compiled)
    return compiled


def _prepare(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return module._orig_mod.prepare_call(args, kwargs)
