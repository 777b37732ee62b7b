"""`fastdiff tune`: measure ahead which kernels and forms a model is to take on this machine, and show it."""

from __future__ import annotations

import argparse
import time

from ..errors import UsageError
from .arguments import add_model_arguments, size
from .loading import check_model_arguments, load_pipeline


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    tune = commands.add_parser("tune", help="measure which kernels are fast on this machine; later processes use it")
    tune.add_argument("--size", type=size, metavar="WxH", help="in pixels; the model's own size by default")
    add_model_arguments(tune)
    tune.set_defaults(check=check_model_arguments, run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from ..attention_choice import attention_table
    from ..choices import form_table, measure_again, tuned_models, tuner_for

    pipe = load_pipeline(arguments)
    if pipe.unet.device.type not in ("cpu", "cuda"):
        raise UsageError(f"nothing to measure on {pipe.unet.device}: kernels are chosen on CPUs and NVIDIA GPUs")
    started = time.perf_counter()
    width, height = arguments.size or (None, None)
    side = None if width is None else round((width * height) ** 0.5) // pipe.vae_scale_factor
    models, config = tuned_models(pipe), pipe.active_config
    tuning = config.tuning
    if tuning == "off":
        raise UsageError("--tuning off: this command measures; name a file, or leave it out")
    if not models:
        raise UsageError(f"--preset {arguments.preset}: the stock classes stay in place, and nothing is chosen")
    if config.fuse_qkv:
        pipe.fuse_qkv_projections()  # now, and not with the plan: what is measured has to be what runs
    # On GPUs layers have one form.
    measured = [(model, measure_again(model, tuning, side)) for model in models if model.device.type == "cpu"]
    attention: list[str] = []
    if config.attention == "auto":
        denoisers = [model for model in models if model is not pipe.vae]
        attention = attention_table(denoisers, tuning, config.quantization != "none", side)
    seconds = time.perf_counter() - started
    _ = pipe.plan  # which gives each layer the form that the preset, the dtype and the measurements allow
    rows = [*(row for model, answers in measured for row in form_table(model, answers)), *attention]
    print("\n".join(rows))
    path = tuner_for(models[0], tuning).record.path
    print(f"{len(rows)} shapes in {seconds:.1f} s, kept in {path}")
    return 0
