"""What all forms of a weight have in common: made from a plain layer, run, and given up for the plain weight."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from .adapters import is_attaching
from .storage import deepcopy_sharing, is_plain

NO_SOURCE = (
    "This layer's plain weight is nowhere: the checkpoint was saved quantized. Load the checkpoint that it was made "
    "from for what needs plain weights (merging a LoRA, saving for stock diffusers, moving to another device)."
)


class Source(Protocol):
    """Where a plain weight is."""

    @property
    def nbytes(self) -> int:
        """What keeping it costs in host memory."""

    def read(self) -> torch.Tensor:
        """The weight, in host memory."""


class Kind(NamedTuple):
    """What a plain weight looks like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class Form(nn.Module):
    """Mixed in before the class of a layer whose weight is held in another form than the plain one.

    Whoever asks for `weight` gets the plain one, exact, and with it a plain layer: the weight may be about to be
    edited. So whatever edits, merges, moves, casts or differentiates it works as in stock, and the plan makes the form
    anew when it is next applied. State-dict keys and values are the stock ones; saving makes plain copies for as long
    as it takes.

    A subclass says `_plain`, the class to turn back to, and `_hold`. A lossless form also says `_plain_weight`; from a
    lossy one the plain weight comes back from its source.
    """

    _plain: type[nn.Module]
    # Attributes beside the parameters that belong to the form.
    _extras: tuple[str, ...] = ()
    source: Source | None
    kind: Kind

    @classmethod
    @torch.no_grad()
    def make(cls, layer: nn.Module, source: Source | None = None) -> None:
        """Give a plain layer this form, in place.

        Args:
            layer: of the class `_plain`.
            source: where a lossy form's plain weight comes back from.
        """
        weight = layer._parameters["weight"]
        assert weight is not None
        kind = Kind(weight.shape, weight.dtype, weight.device, weight.requires_grad)
        cls._take(layer, cls._hold(layer, weight.detach()), kind, source)

    @classmethod
    def _take(cls, layer: nn.Module, held: dict[str, torch.Tensor], kind: Kind, source: Source | None) -> None:
        others = {name: p for name, p in layer._parameters.items() if name != "weight"}
        parameters = {}
        for name, tensor in held.items():
            can_train = type(tensor) is torch.Tensor and tensor.is_floating_point()
            parameters[name] = nn.Parameter(tensor, requires_grad=kind.requires_grad and can_train)
        layer.__dict__.update(source=source, kind=kind)
        layer._parameters = {**parameters, **others}
        layer.__class__ = cls

    @classmethod
    def _hold(cls, layer: nn.Module, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that hold the form of a plain weight, by the names of their parameters."""
        raise NotImplementedError

    def held(self) -> list[torch.Tensor]:
        """The tensors that hold the form."""
        return [p for name, p in self._parameters.items() if name != "bias" and p is not None]

    def _plain_weight(self) -> torch.Tensor:
        """A plain copy of the weight."""
        if self.source is None:
            raise ValueError(NO_SOURCE)
        return self.source.read().to(self.kind.device, self.kind.dtype).view(self.kind.shape)

    def can_give_up(self) -> bool:
        """Whether there is a plain weight to go back to."""
        return self.source is not None

    @torch.no_grad()
    def give_up(self) -> None:
        """Turn into a plain layer.

        Raises:
            OSError: the checkpoint that the plain weight comes from has changed or vanished; the form stays.
            ValueError: there is no source.
        """
        self._become_plain(self._plain_weight())

    def _show_weight(self) -> None:
        """Turn into a plain layer for somebody who asked for the weight."""
        self.give_up()

    def _become_plain(self, weight: torch.Tensor) -> None:
        bias = self._parameters.get("bias")
        self._parameters = {"weight": nn.Parameter(weight, requires_grad=self.kind.requires_grad), "bias": bias}
        for name in ("source", "kind", *self._extras):
            self.__dict__.pop(name, None)
        self.__class__ = self._plain  # type: ignore[assignment]  # the layer's own class, whose instance it is

    if TYPE_CHECKING:
        weight: Any
    else:

        @property
        def weight(self) -> nn.Parameter:
            """The plain weight. Asking for it ends the form: it may be about to be edited."""
            if is_attaching():
                return nn.Parameter(self.stand_in(), requires_grad=False)
            self._show_weight()
            return self.weight

    def stand_in(self) -> torch.Tensor:
        """A tensor of the plain weight's shape, dtype and device that takes no memory."""
        return torch.zeros((), dtype=self.kind.dtype, device=self.kind.device).expand(self.kind.shape)

    def _can_compute(self, x: torch.Tensor) -> bool:
        """False for inputs that the form's kernels do not take: another dtype (autocast), or gradients wanted."""
        if x.dtype is not self.kind.dtype or x.device != self.kind.device:
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or self.kind.requires_grad))

    def _as_plain(self, *args) -> torch.Tensor:
        self.give_up()
        return type(self).forward(self, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            # What it was is of no interest, and need not be read.
            self._become_plain(self.stand_in())
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def _follows(self, kind: Kind) -> bool:
        """Whether the form can stay when its layer is moved or cast so that the plain weight would look like this."""
        return kind == self.kind

    def _apply(self, fn, recurse: bool = True):
        # A move or cast that changes nothing, as every plan makes one, leaves the form.
        after = fn(torch.empty(0, dtype=self.kind.dtype, device=self.kind.device))
        kind = self.kind._replace(dtype=after.dtype, device=after.device)
        if not self._follows(kind):
            if after.device.type == "meta":
                self._become_plain(self.stand_in())
            else:
                self.give_up()
            return self._apply(fn, recurse)
        held = self._parameters
        self._parameters = {"bias": held.get("bias")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = {**held, **self._parameters}
        self.__dict__["kind"] = kind
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.stand_in() if is_attaching() else self._plain_weight()
        bias = self._parameters.get("bias")
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        names = [name for name in ("weight", "bias") if name == "weight" or self._parameters.get(name) is not None]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if len(absent) == len(names):
            # An adapter's state dict, for example, which has nothing for this layer.
            missing_keys.extend(absent if strict else [])
            return
        if prefix + "weight" in absent:
            self.give_up()
        else:
            self._become_plain(torch.empty(self.kind.shape, dtype=self.kind.dtype, device=self.kind.device))
        self._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)

    def __deepcopy__(self, memo: dict):
        return deepcopy_sharing(self, self.held(), memo)

    def __getstate__(self) -> dict:
        # Packed tensors cannot be pickled: what comes out of a pickle is plain.
        state = self.__dict__.copy()
        for name in ("source", *self._extras):
            state.pop(name, None)
        return {**state, "_parameters": {"weight": self._plain_weight(), "bias": self._parameters.get("bias")}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._become_plain(self._parameters["weight"])  # type: ignore[arg-type]  # never None


def count_forms(model: nn.Module) -> dict[type, int]:
    """How many layers of a model have their weight in which form; plain ones are not counted."""
    return Counter(type(module) for module in model.modules() if isinstance(module, Form))


def quantized_by_hand(model: nn.Module) -> int:
    """How many layers of a model hold weights that the user, or diffusers' loading, has quantized."""
    layers = (module for module in model.modules() if not isinstance(module, Form))
    return sum(any(not is_plain(p) for p in layer._parameters.values() if p is not None) for layer in layers)


def give_up_forms(model: nn.Module) -> None:
    """Give a model its plain weights back."""
    for module in list(model.modules()):
        if isinstance(module, Form) and module.can_give_up():
            module.give_up()
