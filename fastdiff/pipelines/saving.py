"""What `save_pretrained` adds, so that stock's plain `from_pretrained(folder)` draws."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ..weights import save_quantized

# To a type checker the pipeline that the mixin is part of.
_Pipeline: Any = object

_STOCK_DTYPE = "float32"


class SavingMixin(_Pipeline):
    """`save_pretrained` of a fast pipeline."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, quantized: bool = False, **kwargs) -> None:
        """Save what stock diffusers loads with fastdiff not installed, whatever is applied.

        Text encoders name the dtype in which diffusers loads its own models when none is asked for.

        Args:
            save_directory: made if need be.
            quantized: write UNet and ControlNets in their quantized form, which fastdiff alone loads, half as large.

        Raises:
            ValueError: `quantized`, and nothing is; or the pipeline was loaded quantized and has no plain weights.
        """
        with self._quantized_saving() if quantized else nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)
        if not self.fast_config.is_off:
            _name_dtype(Path(save_directory))

    @contextmanager
    def _quantized_saving(self) -> Iterator[None]:
        self._apply_plan()
        models = [model for model in self._denoisers() if getattr(model, "quantized", None) is not None]
        if not models:
            raise ValueError("save_pretrained(quantized=True): nothing is quantized here; pipe.explain() says why.")
        for model in models:
            # What the stock method calls for each component.
            model.__dict__["save_pretrained"] = partial(save_quantized, model)
        try:
            yield
        finally:
            for model in models:
                del model.__dict__["save_pretrained"]


def _name_dtype(folder: Path) -> None:
    """Without `torch_dtype`, diffusers loads its models in float32, and transformers its own in the dtype that their
    configuration names. Left at bfloat16, the two would not fit each other. The files keep the dtype they are in.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "transformers_version" in config and config.get("dtype", _STOCK_DTYPE) != _STOCK_DTYPE:
            config["dtype"] = _STOCK_DTYPE
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
