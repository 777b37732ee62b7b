"""All numbers of a GPU: SDXL of full size with random weights, 1024x1024, 30 steps, batch 1 and 8.

    python benchmarks/gpu.py                 # cut off? the same command goes on after the last finished part
    python benchmarks/gpu.py --dry-run       # on the CPU, with the embedded model, in seconds

What matters most comes first: attention kernels; the presets with and without CUDA graphs, their warm-up, waits,
kernels and pictures a second; then the ladder, whose recipe searches for kernels for minutes, and its other rungs. A
probes JSON, and for each batch size of the ladder one JSON and one picture, in benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_probes import attention_backends, probe_preset, probe_report  # noqa: E402
from scenarios import LADDER, RECIPE, REFERENCE, SDXL_RANDOM, Settings, rungs_for  # noqa: E402

from fastdiff import EMBEDDED_CHECKPOINT  # noqa: E402
from fastdiff.bench.machine import describe, machine_info  # noqa: E402
from fastdiff.bench.plot import draw  # noqa: E402
from fastdiff.bench.run import OtherRunError, run_ladder  # noqa: E402
from fastdiff.bench.timing import timed  # noqa: E402

MEASURES = ("picture", "step", "vae")
PRESETS = ("balanced", "exact")
# The targets are ratios to these; what is left of the ladder comes last.
FIRST = (REFERENCE, "exact", "balanced")
# At larger batches these take minutes and say nothing that batch 1 does not.
SMALL_BATCH_ONLY = ("float32", "bfloat16")
# Nothing that compiles: a dry run is to take seconds.
DRY_RUNGS = ["sdpa", "channels-last", "exact", "balanced"]
_MATMUL_CALLS = 20


def matmul_tflops(device: str, size: int) -> float:
    """The bfloat16 matrix product's speed in TFLOP/s, (size, size) x (size, size): the best of three runs."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(_MATMUL_CALLS):
            left @ right

    seconds = [timed(multiply, device)[0] for _ in range(4)]
    return 2 * size**3 * _MATMUL_CALLS / min(seconds[1:]) / 1e12


def report(results: dict) -> str:
    """The table of one batch size, in Markdown."""
    batch, peak = results["settings"]["batch"], results["matmul_tflops"]
    recipe = results["rungs"].get(RECIPE, {}).get("times")
    lines = [
        f"Batch {batch}, {results['settings']['steps']} steps, {describe(results['machine'])}, "
        f"bfloat16 product {peak:.3g} TFLOP/s",
        "",
        "| | UNet ms/step | VAE ms | picture ms | pictures/s | stock / this | recipe / this | TFLOP/s | of product "
        "| memory GiB | waits/step | set-up s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rung in results["rungs"].values():
        if "missing" in rung:
            lines.append(f"| {rung['label']} | {rung['missing']} |" + " |" * 10)
            continue
        step, vae, picture = (rung["times"][name]["median"] for name in ("step", "vae", "picture"))
        tflops = results["step_flops"] / step / 1e12
        memory = f"{sum(rung['memory'].values()) / 2**30:.1f}" if "memory" in rung else "-"
        waits = "-" if rung["waits"] is None else f"{rung['waits']['per_step']:g}"
        against = f"{recipe['picture']['median'] / picture:.2f}" if recipe else "-"
        cells = [
            rung["label"] + (f" (as {rung['same_as']})" if "same_as" in rung else ""),
            f"{step * 1e3:.2f}",
            f"{vae * 1e3:.1f}",
            f"{picture * 1e3:.0f}",
            f"{batch / picture:.2f}",
            f"{rung['ratios']['picture'][REFERENCE]['median']:.2f}",
            against,
            f"{tflops:.3g}",
            f"{tflops / peak:.0%}",
            memory,
            waits,
            f"{sum(rung['setup_s'].values()):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def climb(settings: Settings, names: list[str], path: Path, model_name: str) -> dict:
    """Climb some rungs; returns the results of all that are in the file, with the matrix product's speed."""
    speed = matmul_tflops(settings.device, 8192 if settings.device == "cuda" else 128)
    results = run_ladder(settings, rungs_for(settings, names), path, model_name)
    # Compiled code of one batch size would make the next one recompile with symbolic sizes.
    torch._dynamo.reset()
    results["matmul_tflops"] = round(speed, 3)
    _save(results, path)
    return results


def probe(settings: Settings, batches: list[int], path: Path) -> dict:
    """Measure what is not in the file yet; returns all of it."""
    fresh = {"machine": machine_info(settings.device), "date": str(datetime.date.today()), "presets": {}}
    probes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fresh
    if probes["machine"] != fresh["machine"]:
        raise OtherRunError(f"{path.name} holds a run of another machine; move it away or choose another --out")
    if "attention" not in probes:
        probes["attention"] = attention_backends(settings)
        _save(probes, path)
    for name in PRESETS:
        if name not in probes["presets"]:
            probes["presets"][name] = probe_preset(name, settings, batches)
            _save(probes, path)
            torch._dynamo.reset()
    return probes


def _save(results: dict, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _newest(folder: Path, theme: str) -> Path:
    """The file of a run that was begun, or that of one to begin."""
    begun = sorted(folder.glob(f"{theme}_*.json"))
    return begun[-1] if begun else folder / f"{theme}_{datetime.date.today()}.json"


def main(argv: list[str] | None = None) -> int:
    """Run, print a table for each batch size; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with the embedded model")
    parser.add_argument("--batches", type=int, nargs="+", help="pictures of a call (1 8)")
    parser.add_argument("--steps", type=int, help="denoising steps (30)")
    parser.add_argument("--rungs", nargs="+", choices=[rung.name for rung in LADDER], help="all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --dry-run runs on the CPU")

    dry = arguments.dry_run
    common = {
        "model": EMBEDDED_CHECKPOINT if dry else SDXL_RANDOM,
        "size": (64, 64) if dry else (1024, 1024),
        "steps": arguments.steps or (2 if dry else 30),
        "measures": MEASURES,
        "device": "cpu" if dry else "cuda",
        "rounds": 2 if dry else 5,
        "seconds": 6,
    }
    hardware = "dry" if dry else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    model_name = "embedded" if dry else SDXL_RANDOM
    batches = arguments.batches or ([1, 2] if dry else [1, 8])
    wanted = arguments.rungs or (DRY_RUNGS if dry else [rung.name for rung in LADDER])

    path = _newest(arguments.out, f"gpu_probes_{hardware}")
    probes = probe(Settings(batch=1, **common), batches, path)
    print(probe_report(probes), "", f"wrote {path.name}", "", sep="\n", flush=True)

    # By part rather than by batch, so that a run that is cut off has the most to say.
    parts = [(FIRST, batch) for batch in batches] + [((RECIPE,), batch) for batch in batches]
    parts += [(tuple(rung.name for rung in LADDER if rung.name not in (*FIRST, RECIPE)), batch) for batch in batches]
    for part, batch in parts:
        names = [n for n in wanted if n in part and (batch == 1 or n not in SMALL_BATCH_ONLY)]
        if not names:
            continue
        settings = Settings(batch=batch, **common)
        path = _newest(arguments.out, f"ladder_{hardware}_batch{batch}")
        results = climb(settings, names, path, model_name)
        draw(results, path.with_suffix(".png"))
        print(report(results), "", f"wrote {path.name} and {path.stem}.png", "", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
