"""Train the tiny SDXL on drawings made on the fly.

    python -m fastdiff.shapes.training.train --work-dir WORK --output fastdiff/shapes/checkpoint

Three stages, each counted in steps: autoencoder, text encoders, denoiser (with the text encoders). The run
saves its state as it goes; the same command continues after an interruption, and a finished run only exports.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .architecture import build_pipeline, save_checkpoint
from .stages import AutoencoderStage, DenoiserStage, Pool, TextStage, build_pool

EMA_DECAY = 0.999
WARMUP_STEPS = 50
SAVE_EVERY = 100

Stage = AutoencoderStage | TextStage | DenoiserStage


class OutOfTime(Exception):
    """The time budget ended before the last step; the state is saved."""


def run_stage(stage: Stage, work_dir: Path, deadline: float, device: torch.device) -> None:
    """Run the stage from where it was left to its last step, and leave its averaged weights in the modules.

    Args:
        stage: what to minimise and for how many steps.
        work_dir: where `<stage>.pt` holds the state.
        deadline: `time.monotonic()` at which to save and raise `OutOfTime`.
        device: where the modules live.
    """
    path = work_dir / f"{stage.name}.pt"
    modules = stage.modules()
    parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    step = 0
    if path.exists():
        state = torch.load(path, map_location=device)
        step = state["step"]
        _copy(state["parameters"], parameters)
        _copy(state["average"], average)
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, mininterval=10, smoothing=0.05)
    smooth = None
    for module in modules:
        module.train()
    while step < stage.steps and time.monotonic() < deadline:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage.steps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = stage.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, parameters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        bar.update()
        if step % SAVE_EVERY == 0 or step == stage.steps:
            _save(path, step, parameters, average, optimizer)
    bar.close()
    if step < stage.steps:
        _save(path, step, parameters, average, optimizer)
    _copy(average, parameters)
    for module in modules:
        module.eval().requires_grad_(True)
    if step < stage.steps:
        raise OutOfTime(f"{stage.name}: stopped at step {step} of {stage.steps}")


def load_or_build_pool(path: Path, pipeline, size: int, seed: int, device: torch.device) -> Pool:  # noqa: ANN001
    """The encoded drawings, from the work folder where an earlier run left them."""
    if path.exists():
        return torch.load(path, weights_only=False)
    pool = build_pool(pipeline.vae, size, seed, device)
    torch.save(pool, path)
    return pool


def train(arguments: argparse.Namespace) -> bool:
    """Run or continue all stages and export. Returns whether the last step was reached."""
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    device = torch.device(arguments.device)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    pipeline = build_pipeline(arguments.seed).to(device)
    seed, work_dir, finished = arguments.seed, arguments.work_dir, True
    try:
        run_stage(AutoencoderStage(pipeline, arguments.vae_steps, seed, device), work_dir, deadline, device)
        pool = load_or_build_pool(work_dir / "pool.pt", pipeline, arguments.pool, seed, device)
        pipeline.vae.register_to_config(scaling_factor=pool.scaling_factor)
        run_stage(TextStage(pipeline, arguments.text_steps, seed, device), work_dir, deadline, device)
        run_stage(DenoiserStage(pipeline, pool, arguments.steps, seed, device), work_dir, deadline, device)
    except OutOfTime as stopped:
        print(f"out of time, run again to continue: {stopped}")
        finished = False
    save_checkpoint(pipeline.to("cpu"), arguments.output)
    return finished


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)


def _save(path: Path, step: int, parameters: list, average: list, optimizer: torch.optim.Optimizer) -> None:
    part = path.with_suffix(".part")
    state = {"step": step, "average": average, "optimizer": optimizer.state_dict()}
    torch.save(state | {"parameters": [parameter.detach() for parameter in parameters]}, part)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="state of the run, to continue from")
    parser.add_argument("--output", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, help="time budget; run again to continue (default: none)")
    parser.add_argument("--vae-steps", type=int, default=4800)
    parser.add_argument("--text-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5000, help="steps of the denoiser")
    parser.add_argument("--pool", type=int, default=10000, help="how many drawings the denoiser sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
