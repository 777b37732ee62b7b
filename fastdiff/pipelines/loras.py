"""LoRAs by file, for the command line and its workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Adapters that stay loaded while others are drawn with, so that rows which take turns read no file anew.
_KEPT = 8


class LoraShelf:
    """The adapters of a pipeline by the files that they come from: each read once, and any of them active.

    Args:
        pipe: an SDXL pipeline without adapters.
    """

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._names: dict[str, str] = {}
        self._active: tuple | None = ()
        self._count = 0

    def use(self, loras: Sequence[tuple[str, float]]) -> None:
        """Draw with these adapters, and no others, from now on.

        Args:
            loras: files and weights.

        Raises:
            ValueError: a file holds no LoRA for SDXL; then none is active.
        """
        if tuple(loras) == self._active:
            return
        self._active = None  # until all has gone well
        for file, _ in loras:
            self._load(file)
        if loras:
            self._pipe.enable_lora()
            self._pipe.set_adapters([self._names[file] for file, _ in loras], [weight for _, weight in loras])
        elif self._names:
            self._pipe.disable_lora()
        wanted = {file for file, _ in loras}
        for file in [file for file in self._names if file not in wanted][: max(0, len(self._names) - _KEPT)]:
            self._pipe.delete_adapters(self._names.pop(file))
        self._active = tuple(loras)

    def _load(self, file: str) -> None:
        if file in self._names:
            self._names[file] = self._names.pop(file)  # the last to be used is the last to go
            return
        self._count += 1
        name = f"lora {self._count}"
        try:
            self._pipe.load_lora_weights(file, adapter_name=name)
        except Exception as error:
            if any(name in names for names in self._pipe.get_list_adapters().values()):
                self._pipe.delete_adapters(name)
            if self._names:
                self._pipe.disable_lora()
            raise ValueError(f"lora {file}: {' '.join(str(error).split())[:300]}") from error
        self._names[file] = name
