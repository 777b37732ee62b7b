"""Runs the ladder: one rung after the other, each timed in turn with the reference, saved as soon as it is done."""

from __future__ import annotations

import datetime
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .ladder import LADDER, Rung, weight_bytes
from .machine import machine_info
from .settings import RECIPE, REFERENCE, Settings
from .stock import load_stock
from .timing import Memory, spread, timed
from .workloads import as_array, step_flops, workload

# Weights drawn at random amplify the rounding of 16-bit numbers; beyond this it is another result.
_LARGEST_ERROR = 0.5
# The first call compiles, the second may capture a CUDA graph, the third is as fast as all that follow.
_WARMUP_CALLS = 3
_MIN_ROUNDS = 2


class WrongResultError(RuntimeError):
    """A rung computes something else than the reference."""


class OtherRunError(ValueError):
    """The file to resume from holds a run with other settings, or of another machine."""


def run_ladder(
    settings: Settings, rungs: list[Rung], path: Path | None = None, model_name: str | None = None, bar: bool = True
) -> dict:
    """Time every rung and return the results, as JSON holds them.

    The reference rung, and the documented recipe from its own turn on, stay in memory and are timed in every round of
    the others: what slows the machine down for a while slows all of them, and ratios stay right.

    Args:
        path: JSON file, written after each rung. Rungs that it holds already are not run again.
        model_name: how results call the model.

    Raises:
        OtherRunError: `path` holds results that these cannot be added to.
        WrongResultError: a rung's result is not finite or far from the reference's.
        Exception: whatever a rung raises, with the results so far saved.
    """
    results = _open_results(settings, path, model_name)
    todo = []
    for rung in rungs:
        reason = rung.missing(settings)
        if reason is not None:
            results["rungs"][rung.name] = {"label": rung.label, "kind": rung.kind, "missing": reason}
        elif "times" not in results["rungs"].get(rung.name, {}):
            todo.append(rung)
    if todo:
        _run(settings, todo, results, path, bar)
    _save(results, path)
    return results


def _run(settings: Settings, todo: list[Rung], results: dict, path: Path | None, bar: bool) -> None:
    base = load_stock(settings)
    reference = next(rung for rung in LADDER if rung.name == REFERENCE)
    if "step" in settings.measures:
        results["step_flops"] = step_flops(base.unet, settings)
    todo.sort(key=lambda rung: rung is not reference)
    anchors = {REFERENCE: _Runner(reference, base, settings)}
    anchors[REFERENCE].warm_up()
    with tqdm(todo, unit="rung", disable=not bar, file=sys.stderr) as progress:
        for rung in progress:
            progress.set_description(rung.label)
            try:
                record = _climb(rung, base, anchors, results, progress)
            except BaseException:
                print(f"\n{rung.name} failed; the rungs before it are kept", file=sys.stderr)
                raise
            results["rungs"][rung.name] = {"label": rung.label, "kind": rung.kind, **record}
            _save(results, path)
            gc.collect()


class _Runner:
    """A rung's pipeline and what it has shown so far."""

    def __init__(self, rung: Rung, base, settings: Settings):
        self.rung, self.settings = rung, settings
        self.memory = Memory(settings.device)
        build_s, (self.pipe, self.plan) = timed(lambda: _built(rung, base, settings), settings.device)
        self.outputs: dict[str, np.ndarray] = {}
        self._functions: dict[str, Callable] = {}
        self.setup_s = {"build": round(build_s, 2)}

    def warm_up(self) -> None:
        """Call each workload until it is as fast as it gets."""
        self.held = self.memory.current()
        for name in self.settings.measures:
            # Two steps of a picture compile all that thirty need.
            function = workload(name, self.pipe, self.settings, steps=2)
            calls = [timed(function, self.settings.device)[0] for _ in range(_WARMUP_CALLS)]
            self.setup_s[name] = round(max(0.0, sum(calls[:-1]) - (len(calls) - 1) * calls[-1]), 2)
        self.memory.reset_peak()

    def call(self, name: str) -> float:
        """Seconds of one call, with the same inputs every time; the result of the first is kept for comparison."""
        if name not in self._functions:
            self._functions[name] = workload(name, self.pipe, self.settings)
        seconds, output = timed(self._functions[name], self.settings.device)
        if name not in self.outputs:
            self.outputs[name] = as_array(output)
        return seconds


def _climb(rung: Rung, base, anchors: dict[str, _Runner], results: dict, progress: tqdm) -> dict:
    if rung.kind == "peer":
        anchors.pop(RECIPE, None)  # its memory is needed, and peers are compared with stock
    progress.set_postfix_str("building")
    runner = _Runner(rung, base, anchors[REFERENCE].settings)
    for name, record in results["rungs"].items():
        if runner.plan is not None and record.get("plan") == runner.plan:
            # On this machine the preset does just what an earlier one does.
            kept = {key: value for key, value in record.items() if key not in ("label", "kind")}
            return {**kept, "same_as": record.get("same_as", name)}
    progress.set_postfix_str("first calls")
    runner.warm_up()
    record = _measure(runner, anchors, progress)
    if rung.name == RECIPE:
        anchors[RECIPE] = runner
    return record


def _measure(runner: _Runner, anchors: dict[str, _Runner], progress: tqdm) -> dict:
    settings = runner.settings
    record = {"times": {}, "ratios": {}, "errors": {}, "setup_s": runner.setup_s, "plan": runner.plan}
    for name in settings.measures:
        progress.set_postfix_str(name)
        times, ratios = _rounds(name, runner, anchors, settings)
        record["times"][name], record["ratios"][name] = times, ratios
        record["errors"][name] = _check(name, runner, anchors[REFERENCE])
    peak = runner.memory.peak()
    if peak is not None and runner.held is not None:
        record["memory"] = {"weights": weight_bytes(runner.pipe), "working": max(0, peak - runner.held)}
    record["waits"] = _waits(runner)
    return record


def _rounds(name: str, runner: _Runner, anchors: dict[str, _Runner], settings: Settings) -> tuple[dict, dict]:
    """Time the runner and the anchors in turn. The reference, timed beside itself, shows how far equals differ."""
    for each in (*anchors.values(), runner):
        # Building a rung may have pushed weights out of the caches; and a step is one of a loop, whose first step
        # alone meets a new prompt.
        each.call(name)
    own: list[float] = []
    others: dict[str, list[float]] = {anchor: [] for anchor in anchors}
    while len(own) < settings.rounds:
        for anchor, other in anchors.items():
            others[anchor].append(other.call(name))
        own.append(runner.call(name))
        if len(own) >= _MIN_ROUNDS and sum(own) + sum(map(sum, others.values())) > settings.seconds:
            break
    ratios = {
        anchor: spread([theirs / mine for theirs, mine in zip(seconds, own, strict=True)], 4)
        for anchor, seconds in others.items()
    }
    return spread(own), ratios


def _check(name: str, runner: _Runner, reference: _Runner) -> float:
    """Relative distance from the reference's result."""
    own, expected = runner.outputs[name], reference.outputs[name]
    error = float(np.linalg.norm(own - expected) / np.linalg.norm(expected))
    if not error < _LARGEST_ERROR:  # also where it is not a number
        raise WrongResultError(f"{runner.rung.name}: {name} differs from stock's by {error:.3g} of its norm")
    return float(f"{error:.3g}")


def _waits(runner: _Runner) -> dict | None:
    """How often the host waits for the GPU in a picture; None where there is none."""
    if torch.device(runner.settings.device).type != "cuda" or "picture" not in runner.settings.measures:
        return None
    counts: list[int] = []
    width, height = runner.settings.size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def count() -> int:
            return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

        def after_step(pipe, index, timestep, tensors) -> dict:
            counts.append(count())
            return {}

        torch.cuda.set_sync_debug_mode("warn")
        try:
            runner.pipe(
                ["a red circle on a blue background"] * runner.settings.batch,
                width=width,
                height=height,
                num_inference_steps=4,
                callback_on_step_end=after_step,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        total = count()
    return {"per_step": (counts[-1] - counts[0]) / (len(counts) - 1), "per_picture_of_4_steps": total}


def _built(rung: Rung, base, settings: Settings) -> tuple:
    """A rung's pipeline, and what it applies if it is a fast one, which is done here and now."""
    pipe = rung.build(base, settings)
    plan = [f"{step.name}: {step.reason}" for step in pipe.plan if step.applied] if hasattr(pipe, "plan") else None
    return pipe, plan


def _open_results(settings: Settings, path: Path | None, model_name: str | None) -> dict:
    fresh = {
        "settings": settings.as_json(model_name),
        "machine": machine_info(settings.device),
        "date": datetime.date.today().isoformat(),
        "rungs": {},
    }
    if path is None or not path.exists():
        return fresh
    held = json.loads(path.read_text(encoding="utf-8"))
    for part in ("settings", "machine"):
        if held.get(part) != fresh[part]:
            raise OtherRunError(
                f"{str(path)!r} holds a run with other {part}; to resume, use the same arguments on the same machine, "
                "or else write to another file"
            )
    return held


def _save(results: dict, path: Path | None) -> None:
    order = [rung.name for rung in LADDER]
    results["rungs"] = {name: results["rungs"][name] for name in order if name in results["rungs"]}
    if path is not None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
