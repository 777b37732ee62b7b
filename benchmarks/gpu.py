"""All numbers of a GPU: SDXL of full size with random weights, 1024x1024, 30 steps.

    python benchmarks/gpu.py --budget 1700   # cut off? the same command goes on with what is missing
    python benchmarks/gpu.py --dry-run       # on the CPU, with the embedded model

The parts, the most telling first, run one after the other, each in a process of its own with a time of its own. Every
figure is in the file the moment it exists: a part that fails prints why, and the next one runs. The compiler's caches
stay between the parts and between calls on one machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_parts import PARTS  # noqa: E402
from gpu_record import Part, Record  # noqa: E402

from fastdiff import EMBEDDED_CHECKPOINT  # noqa: E402
from fastdiff.bench.settings import MEASURES, SDXL_RANDOM, Settings  # noqa: E402

# A part that gets less than this could only load.
_LEAST_SECONDS = 20
_FIRST = ("taken off", "first picture", "error", "waits", "pictures/s")


def settings_for(dry: bool, steps: int | None) -> Settings:
    """What is measured: full size on the GPU, or the embedded model on the CPU."""
    return Settings(
        model=EMBEDDED_CHECKPOINT if dry else SDXL_RANDOM,
        size=(64, 64) if dry else (1024, 1024),
        steps=steps or (2 if dry else 30),
        measures=MEASURES,
        device="cpu" if dry else "cuda",
        rounds=2 if dry else 7,
    )


def run_part(name: str, record: Record, settings: Settings, broken: str | None) -> int:
    """Run one part in this process; returns the exit code."""
    plan, part = next(plan for plan in PARTS if plan.name == name), Part(name, record)
    try:
        if broken == "raise":
            raise RuntimeError("made to raise")
        if broken == "hang":
            part.figure("before it hangs", time.time)
            time.sleep(3600)
        plan.run(part, settings)
    except BaseException as error:
        traceback.print_exc()
        record.add(name, state="failed", why=f"{type(error).__name__}: {error}"[:2000])
        return 1
    state = ("failed", f"{part.failed} figures could not be had") if part.failed else ("done", "")
    record.add(name, state=state[0], why=state[1])
    return 0


def drive(names: list[str], record: Record, budget: float, limit: float | None, passed_on: list[str]) -> None:
    """Run what is not done yet, each part in a process of its own, for no longer than the budget."""
    started = time.monotonic()
    for plan in PARTS:
        state, _ = record.states().get(plan.name, ("", ""))
        if plan.name not in names or state == "done":
            continue
        seconds = min(limit or plan.seconds, budget - (time.monotonic() - started))
        if seconds < min(_LEAST_SECONDS, limit or plan.seconds):
            print(f"{plan.name}: not begun: the budget of {budget:.0f} s is spent", flush=True)
            continue
        print(f"{plan.name}: at most {seconds:.0f} s", flush=True)
        command = [sys.executable, __file__, "--run", plan.name, "--file", str(record.path), *passed_on]
        process = subprocess.Popen(command)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            record.add(plan.name, state="cut off", why=f"after {seconds:.0f} s")
        else:
            if process.returncode not in (0, 1):
                record.add(plan.name, state="failed", why=f"the process ended with {process.returncode}")
        state, why = record.states().get(plan.name, ("failed", "it left no word"))
        print(f"{plan.name}: {state}{': ' if why else ''}{why}", flush=True)


def report(record: Record) -> str:
    """What was found: ratios to stock first, then all other figures, then what is missing."""
    ratios, first, rest = [], [], []
    for (part, figure), value in record.figures().items():
        if isinstance(value, dict) and "ratio" in value:
            times = f"stock {value['stock']['median'] * 1e3:.2f} ms, this {value['fast']['median'] * 1e3:.2f} ms"
            spread = f"{value['ratio']['min']:.2f} to {value['ratio']['max']:.2f}"
            ratios.append(f"  {part}: {figure}: {value['ratio']['median']:.2f} times stock ({spread}; {times})")
        else:
            lines = first if any(word in figure for word in _FIRST) else rest
            lines.append(f"  {part}: {figure}: {json.dumps(value)[:400]}")
    states = [f"  {part}: {state}{': ' if why else ''}{why}" for part, (state, why) in record.states().items()]
    held = record.figures()
    failed = [line for line in record.lines() if "error" in line and (line["part"], line["figure"]) not in held]
    errors = [f"  {line['part']}: {line['figure']}: {line['error'][:300]}" for line in failed]
    sections = {"Ratios to stock": ratios, "First calls, errors, waits": first, "Others": rest, "Failed": errors}
    text = [line for title, lines in sections.items() if lines for line in (title, *lines)]
    return "\n".join([*text, "Parts", *states])


def _file(folder: Path, dry: bool) -> Path:
    """The file of a run that was begun, or that of one to begin."""
    hardware = "dry" if dry else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    begun = sorted(folder.glob(f"gpu_{hardware}_*.jsonl"))
    return begun[-1] if begun else folder / f"gpu_{hardware}_{datetime.date.today()}.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print a report; returns the exit code: 0 if every part is done."""
    names = [plan.name for plan in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with the embedded model")
    parser.add_argument("--budget", type=float, default=1700, help="seconds for all that is not done yet (1700)")
    parser.add_argument("--part-budget", type=float, help="seconds for each part, in place of its own")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--steps", type=int, help="denoising steps (30)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--break", nargs="+", default=[], dest="broken", metavar="PART=raise|hang",
                        help="with --dry-run: see that a part's failure is survived")  # fmt: skip
    parser.add_argument("--run", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --dry-run runs on the CPU")
    broken = dict(each.split("=") for each in arguments.broken)
    if arguments.run:
        settings = settings_for(arguments.dry_run, arguments.steps)
        return run_part(arguments.run, Record(arguments.file), settings, broken.get(arguments.run))
    record = Record(_file(arguments.out, arguments.dry_run))
    passed_on = ["--dry-run"] * arguments.dry_run + (["--steps", str(arguments.steps)] if arguments.steps else [])
    passed_on += ["--break", *arguments.broken] if arguments.broken else []
    drive(arguments.parts, record, arguments.budget, arguments.part_budget, passed_on)
    print(report(record), f"wrote {record.path.name}", sep="\n", flush=True)
    states = record.states()
    return 0 if all(states.get(name, ("",))[0] == "done" for name in arguments.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
