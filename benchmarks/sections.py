"""The long tables of `benchmarks/README.md`, one function a theme: from the path of a result to Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff.bench.machine import describe
from fastdiff.bench.settings import RECIPE, REFERENCE
from fastdiff.bench.table import ratio, seconds, shown_rungs, title


def adherence(path: Path) -> str:
    """What the embedded model draws, stock and each variant."""
    results = json.loads(path.read_text(encoding="utf-8"))
    first = results["rows"][0]
    lines = [
        f"**What the embedded model draws: {first['captions']} captions that it was not trained on**, {first['steps']} "
        f"Euler steps, guidance {first['guidance_scale']:g}, the same seeds; shape, colour and background judged by "
        "image analysis",
        "",
    ]
    if path.with_suffix(".png").exists():
        lines += [f"![The same prompts and seeds, a row for each variant](results/{path.stem}.png)", ""]
    lines += ["| | dtype | captions satisfied | PSNR to stock | SSIM to stock |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        psnr = row["psnr_vs_stock_db"]
        closeness = ["", ""] if row["variant"] == "stock" else [
            "equal" if psnr is None else f"{psnr:.1f} dB", f"{row['ssim_vs_stock']:.3f}"
        ]
        cells = [f"`{row['variant']}`", row["dtype"], f"{row['satisfied']:.1%}", *closeness]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if name != "fastdiff")
    source = f"From [{path.name}](results/{path.name})."
    lines += ["", f"{results['hardware']}; {versions}; {results['date']}. {source}"]
    return "\n".join(lines)


def ladder(path: Path) -> str:
    """What each rung of the ladder buys."""
    results = json.loads(path.read_text(encoding="utf-8"))
    measure = results["settings"]["measures"][0]
    lines = [f"**{title(results)}**", ""]
    if path.with_suffix(".png").exists():
        lines += [f"![How each rung shortens the time](results/{path.stem}.png)", ""]
    lines += [
        "| | time, median | stock / this | recipe / this | distance from stock's result |",
        "|---|---|---|---|---|",
    ]
    for rung in shown_rungs(results):
        against = rung["ratios"][measure]
        same = f" (here the same as {rung['same_as']})" if "same_as" in rung else ""
        cells = [rung["label"] + same, seconds(rung["times"][measure]["median"])]
        cells += [ratio(against.get(name)) for name in (REFERENCE, RECIPE)]
        cells.append(f"{rung['errors'][measure]:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{describe(results['machine'])}; {results['date']}. Ratios are medians over rounds in which both were timed "
        f"in turn, least to greatest in brackets. From [{path.name}](results/{path.name}).",
    ]
    return "\n".join(lines)


def attention(path: Path) -> str:
    """A step of the UNet at full size."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "One step of the full-size UNet (2.57 B parameters, random weights), bfloat16, classifier-free guidance, "
        "with no compiler: fused projections, context cache, channels_last and packed weights against stock, timed in "
        "turn in one run.",
        "",
        "| size | stock | fast | stock / fast, median (least to greatest) |",
        "|---|---|---|---|",
    ]
    steps = [b for b in data["benchmarks"] if b["params"] and b["params"].get("timed") == "fast"]
    for step in sorted(steps, key=lambda b: b["params"]["size"]):
        size, info = step["params"]["size"], step["extra_info"]
        ratios = f"{info['ratio_median']:.2f} ({info['ratio_min']:.2f} to {info['ratio_max']:.2f})"
        lines.append(f"| {size}x{size} | {info['peer_median_s']:.2f} s | {step['stats']['median']:.2f} s | {ratios} |")
    lines += ["", _source(path, data, "test_bench_unet.py --model sdxl-random --size 256 --size 512")]
    return "\n".join(lines)


def quantization(path: Path) -> str:
    """Speed, bytes and quality of each scheme."""
    results = json.loads(path.read_text(encoding="utf-8"))
    errors = results["unet_256_errors_to_float32"]
    pictures = {row["variant"]: row for row in results["pictures"]}
    stock = pictures["stock, float32"]
    lines = [
        f"**Quantization on a CPU**, by default `int8-dynamic` where it has AMX: the full-size UNet's step at 256x256, "
        f"bfloat16, stock beside fast; and {stock['captions']} held-out captions drawn by the embedded model with "
        f"every eligible layer quantized (stock in float32: {stock['satisfied']:.0%} satisfied).",
        "",
        "| scheme | stock / fast, median (least to greatest) | quantized layers, bytes | UNet, bytes | UNet's output, "
        "error to float32 | captions satisfied | PSNR to bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in results["steps_beside_stock"]:
        scheme = step["test"].rpartition("bfloat16-")[2].rstrip("]")
        drawn, name = pictures[scheme], "bfloat16" if scheme == "none" else scheme
        ratios = f"{step['ratio_median']:.2f} ({step['ratio_min']:.2f} to {step['ratio_max']:.2f})"
        shares = [f"{step[key][1] / step[key][0]:.2f}x" if key in step else "" for key in ("layer_bytes", "unet_bytes")]
        psnr = drawn["psnr_vs_bfloat16_db"]
        cells = [f"`{scheme}`", ratios, *shares, f"{errors[name]['error']:.1%}", f"{drawn['satisfied']:.0%}"]
        lines.append("| " + " | ".join([*cells, "" if psnr is None else f"{psnr:.1f} dB"]) + " |")
    turns = " and ".join(
        f"{row['ratio_median']:.2f} times at {row['size']}x{row['size']}"
        for row in results["int8_dynamic_beside_packed_bfloat16_in_turn"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items())
    lines += [
        "",
        f"Timed in turn with packed bfloat16, `int8-dynamic` is {turns} as fast. {results['machine']['machine']} CPU, "
        f"{results['machine']['threads']} threads; {versions}. From [{path.name}](results/{path.name}), "
        "which also names the worst layers.",
    ]
    return "\n".join(lines)


def quality(path: Path) -> str:
    """What quantization costs: of pictures, or of the UNet's output."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["what"] == "pictures":
        lines = [
            f"**What quantizing every eligible layer costs**: {results['rows'][0]['captions']} held-out captions drawn "
            f"in {results['steps']} steps by the embedded model, in bfloat16 and quantized.",
            "",
            "| form | layers | captions satisfied | PSNR to bfloat16 | SSIM to bfloat16 |",
            "|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            psnr = row["psnr_vs_bfloat16_db"]
            cells = [f"`{row['variant']}`", row["layers"] or "", f"{row['satisfied']:.0%}"]
            cells += ["", ""] if psnr is None else [f"{psnr:.1f} dB", f"{row['ssim_vs_bfloat16']:.4f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    else:
        lines = [
            f"**Distance of a step's result from float32's**: the full-size UNet with random weights at "
            f"{results['size']}x{results['size']}, in bfloat16 and with every eligible layer quantized.",
            "",
            "| form | layers | step | median layer | worst layer |",
            "|---|---|---|---|---|",
        ]
        for form, row in results["rows"].items():
            cells = [f"`{form}`", row.get("layers", ""), f"{row['error']:.1%}"]
            if "worst_layers" in row:
                worst = max(layer["quantized"] for layer in row["worst_layers"].values())
                cells += [f"{row['median_layer']:.1%}", f"{worst:.1%}"]
            lines.append("| " + " | ".join(map(str, [*cells, "", ""][:5])) + " |")
    source = f"From [{path.name}](results/{path.name}), by `python -m fastdiff.bench.quantization {results['what']}`."
    return "\n".join([*lines, "", f"{describe(results['machine'])}; {results['date']}. {source}"])


def compiling(path: Path) -> str:
    """What compiling takes, and gives."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"**Compiling, where asked for**: {data['benchmarks'][0]['group']}, from nothing.",
        "",
        "| `compile` | graphs | share of the UNet's FLOPs | time to compile | step, compiled | step, not compiled |",
        "|---|---|---|---|---|---|",
    ]
    for run in data["benchmarks"]:
        info = run["extra_info"]
        steps = [seconds(info[f"step_{name}_s"]) for name in ("compiled", "eager")]
        cells = [f'`"{run["params"]["mode"]}"`', info["graphs"], f"{info['flop_share']:.1%}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{info['compile_s']:.0f} s", *steps])) + " |")
    return "\n".join([*lines, "", _source(path, data, "test_bench_compile.py --model sdxl-random --size 256")])


def cold_start(path: Path) -> str:
    """From the start of a process to its first picture."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "**From the start of a process to its first picture**: stock without a compiler, and fastdiff with "
        '`compile="regional"`, with the code that `save_compiled` wrote and without. Seconds, medians; the embedded '
        "model draws in 4 steps, the full-size UNet takes one step at 256x256 in bfloat16.",
        "",
        "| | import | load | saved code | first picture | whole process |",
        "|---|---|---|---|---|---|",
    ]
    stages = ("import", "load", "compiled code", "first picture", "total")
    for run in data["benchmarks"]:
        for who, times in run["extra_info"]["seconds"].items():
            name = "with saved code" if who == "compiled" else who.replace("compiled without", "without")
            cells = [f"{times[stage]:.2f}" if stage in times else "" for stage in stages]
            lines.append("| " + " | ".join([f"{run['params']['model']}, {name}", *cells]) + " |")
    return "\n".join([*lines, "", _source(path, data, "test_bench_cold_start.py")])


def lossy(path: Path) -> str:
    """What the opt-in lossy options buy, and cost."""
    data = json.loads(path.read_text(encoding="utf-8"))
    drawn = {}
    for shapes in sorted(path.parent.glob("shapes_*.json")):
        drawn = {row["variant"]: row for row in json.loads(shapes.read_text(encoding="utf-8"))["rows"]}
    lines = [
        f"**What the opt-in lossy options buy, and cost**: {data['benchmarks'][0]['group']}, full-size UNet, beside "
        "the same fast pipeline without the option, timed in turn in one run; captions satisfied by the embedded "
        "model.",
        "",
        "| option | without / with, median (least to greatest) | captions satisfied | without the option |",
        "|---|---|---|---|",
    ]
    for run in data["benchmarks"]:
        info = run["extra_info"]
        ratios = f"{info['ratio_median']:.2f} ({info['ratio_min']:.2f} to {info['ratio_max']:.2f})"
        shares = [drawn.get(name, {}).get("satisfied") for name in (f"exact:{info['options']}", "exact")]
        cells = [f"`{info['options']}`", ratios, *("" if share is None else f"{share:.1%}" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", _source(path, data, "test_bench_lossy.py")]
    return "\n".join(lines)


def lora(path: Path) -> str:
    """What an adapter that is not merged costs, and a swap."""
    data = json.loads(path.read_text(encoding="utf-8"))
    steps = [run for run in data["benchmarks"] if "stock_ratio" in run["extra_info"]]
    lines = [
        f"**A LoRA that is not merged**: {steps[0]['group'].partition(' with ')[2]}, on attention and feed-forward; "
        "the full-size UNet's step, timed in turn in one run.",
        "",
        "| size | stock with it | fast with it | stock / fast, median (least to greatest) | fast with it / without |",
        "|---|---|---|---|---|",
    ]
    for run in steps:
        info, (stock, cost) = run["extra_info"], (run["extra_info"][key] for key in ("stock_ratio", "cost_of_adapter"))
        size = f"{run['params']['size']}x{run['params']['size']}"
        times = [seconds(info["stock_median_s"]), seconds(run["stats"]["median"])]
        ratios = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in (stock, cost)]
        lines.append("| " + " | ".join([size, *times, *ratios]) + " |")
    swap = next(run for run in data["benchmarks"] if run not in steps)
    lines += ["", f"A swap there and back: {seconds(swap['stats']['median'])}; nothing is quantized anew."]
    source = _source(path, data, "test_bench_lora.py --model sdxl-random --size 256 --size 512")
    return "\n".join([*lines, "", source])


def _source(path: Path, data: dict, command: str) -> str:
    machine = data["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']['brand_raw']}, {machine['cpus']} cores, AMX {'yes' if machine['amx_bf16'] else 'no'}; "
        f"{versions}. From [{path.name}](results/{path.name}); repeat it with `pip install '.[bench]' && "
        f"pytest benchmarks/{command}`."
    )
