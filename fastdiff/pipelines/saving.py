"""What `save_pretrained` adds, so that stock's plain `from_pretrained(folder)` draws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# To a type checker the pipeline that the mixin is part of.
_Pipeline: Any = object

_STOCK_DTYPE = "float32"


class SavingMixin(_Pipeline):
    """`save_pretrained` of a fast pipeline."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As upstream; text encoders name the dtype in which diffusers loads its own models when none is asked for."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not self.fast_config.is_off:
            _name_dtype(Path(save_directory))


def _name_dtype(folder: Path) -> None:
    """Without `torch_dtype`, diffusers loads its models in float32, and transformers its own in the dtype that their
    configuration names. Left at bfloat16, the two would not fit each other. The files keep the dtype they are in.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "transformers_version" in config and config.get("dtype", _STOCK_DTYPE) != _STOCK_DTYPE:
            config["dtype"] = _STOCK_DTYPE
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
