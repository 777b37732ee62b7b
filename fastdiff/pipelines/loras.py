"""LoRAs that are chosen when a pipeline is loaded, for the command line and its workers."""

from __future__ import annotations

from collections.abc import Sequence


def load_loras(pipe, loras: Sequence[tuple[str, float]]) -> None:
    """Load adapters and set their weights.

    Args:
        pipe: an SDXL pipeline.
        loras: files and weights; all of them are active.

    Raises:
        ValueError: a file holds no LoRA for SDXL; the pipeline is left without any of them.
    """
    names = [f"lora {number}" for number in range(1, len(loras) + 1)]
    try:
        for name, (file, _) in zip(names, loras, strict=True):
            pipe.load_lora_weights(file, adapter_name=name)
        if loras:
            pipe.set_adapters(names, [weight for _, weight in loras])
    except Exception as error:
        pipe.unload_lora_weights()
        raise ValueError(f"--lora {file}: {' '.join(str(error).split())[:300]}") from error
