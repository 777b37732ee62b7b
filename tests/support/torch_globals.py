"""A script that fails where using fastdiff changes global settings of torch. Prints the stages it has passed."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import diffusers  # noqa: F401  what fastdiff stands on may set what it likes
import peft  # noqa: F401
import torch
import torch._dynamo.callback
import torch._inductor.config
import torch.fx.experimental._config
import torchao.quantization  # noqa: F401
import transformers  # noqa: F401


def snapshot() -> dict[str, object]:
    """Every setting of torch that changes how other code in this process runs or compiles."""
    state: dict[str, object] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sdp": [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math")],
        "filters": list(warnings.filters),
        "callbacks": len(torch._dynamo.callback.callback_handler.start_callbacks),
    }
    configs = (torch._inductor.config, torch._dynamo.config, torch.fx.experimental._config, torch._functorch.config)
    for config in configs:
        state |= {f"{config.__name__}.{name}": value for name, value in config.get_config_copy().items()}
    for backend in (torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul):
        for name in ("enabled", "benchmark", "deterministic", "allow_tf32", "fp32_precision"):
            try:
                state[f"{backend}.{name}"] = getattr(backend, name)
            except (AttributeError, AssertionError, RuntimeError):
                continue
    for name in ("", "torch", "torch._inductor", "torch._dynamo"):
        state[f"logging {name}"] = logging.getLogger(name).level
    return state


def check(stage: str) -> None:
    after = snapshot()
    changed = {name: (before.get(name), after.get(name)) for name in {*before, *after}}
    changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
    if changed:
        sys.exit(f"{stage} changed {changed}")
    print(stage)


before = snapshot()

import fastdiff  # noqa: E402

check("import")

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.embedded import draw, load_fast  # noqa: E402

pipes = {mode: load_fast(fastdiff.FastConfig.preset("exact", compile=mode)) for mode in ("regional", "full")}
check("construction")
# One kind of region, and as the whole the VAE alone, are enough: settings do not depend on what is compiled.
pipes["regional"].unet._repeated_blocks = pipes["regional"].vae._repeated_blocks = ["Downsample2D"]
draw(pipes["regional"])
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
check("regional")
with torch.no_grad():
    assert pipes["full"].plan
    pipes["full"].vae.decode(torch.zeros(1, 4, 8, 8))
check("full")
