"""Lossy forms that wait beside the plain weight that somebody asked for, as most who ask only look."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.form import Form, Kind
from .sources import InFile, free_memory

# Forms are kept while this much host memory is free.
_AMPLE = 4 << 30


class KeptForm:
    """A form that was made from a weight in a file; it hangs on the plain parameter, and lives no longer.

    When the layer gets its form again, its weight has been compared with the file bit for bit. So where it comes from
    the same place in the same file, this is what would be made of it.
    """

    def __init__(self, layer: Form, source: InFile):
        self._form, self._source = type(layer), source
        self._held = {name: p.detach() for name, p in layer._parameters.items() if name != "bias" and p is not None}
        self._extras = {name: layer.__dict__[name] for name in layer._extras}

    def __reduce__(self) -> tuple:
        # Copies, and what is written to a file, have the plain weight alone.
        return type(None), ()

    def give_back(self, layer: Any, form: type[Form], source: Any) -> bool:
        """Make a plain layer what it was, if the form is the one that is asked for; returns whether it is."""
        if form is not self._form or source != self._source:
            return False
        weight = layer._parameters["weight"]
        layer.__dict__.update(self._extras)
        kind = Kind(weight.shape, weight.dtype, weight.device, weight.requires_grad)
        form._take(layer, self._held, kind, source)
        return True


def give_up_and_keep(layer: Form) -> None:
    """Turn a layer into a plain one, as `Form.give_up`; its form is kept if a file holds the weight."""
    source, kept = layer.source, None
    if isinstance(source, InFile) and (free_memory() or 0) > _AMPLE:
        kept = KeptForm(layer, source)
    layer.give_up()
    weight: Any = layer._parameters["weight"]
    weight.kept_form = kept


def take_again(layer: nn.Module, form: type[Form], source: Any) -> bool:
    """Give a plain layer the form that was kept with its weight; returns whether there was one that fits."""
    kept = getattr(layer._parameters["weight"], "kept_form", None)
    return kept is not None and kept.give_back(layer, form, source)
