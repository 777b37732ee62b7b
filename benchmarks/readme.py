"""Writes the tables of measured numbers from the committed results: `python benchmarks/readme.py`.

The README gets one table, with a column for each kind of machine; `benchmarks/README.md` the long ones, by chip.
Results are `benchmarks/results/THEME_..._DATE.json`: `ladder_*` (`fastdiff bench` and `benchmarks/gpu.py`, one for
each hardware, size and batch), `attention_*`, `lora_*`, `lossy_*`, `compile_*` and `cold-start_*` (pytest-benchmark),
`quantization_*` (`python -m fastdiff.bench.quantization` and its benchmark) and `shapes_*` (`python -m
fastdiff.shapes.training.evaluate`). Of the results of a theme on one chip the newest counts; what is not there is left
out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sections  # noqa: E402

from fastdiff.bench.settings import RECIPE, REFERENCE, SDXL_RANDOM  # noqa: E402
from fastdiff.bench.table import UNITS, guidance, ratio  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
AMX, AVX512, AVX2, GPU = "CPU with AMX", "CPU with AVX512, no AMX", "CPU with AVX2", "GPU"
NOT_YET = "not measured yet"
SECTIONS: dict[str, Callable[[Path], str]] = {
    "ladder": sections.ladder,
    "attention": sections.attention,
    "quantization": sections.quantization,
    "quality": sections.quality,
    "compile": sections.compiling,
    "cold-start": sections.cold_start,
    "lossy": sections.lossy,
    "lora": sections.lora,
    "shapes": sections.adherence,
}


@dataclass(frozen=True)
class Result:
    """One committed file.

    Attributes:
        chip: the processor's or GPU's name, which unlike ones may share; empty where the file does not say.
        kind: of machine, a column of the README's table.
    """

    path: Path
    data: dict
    chip: str
    kind: str

    @property
    def theme(self) -> str:
        return self.path.stem.partition("_")[0]

    @property
    def date(self) -> str:
        return self.path.stem.rpartition("_")[2]

    @property
    def what(self) -> str:
        """The name without the date: what is measured again later is called alike."""
        return self.path.stem.rpartition("_")[0]


def load(folder: Path = RESULTS) -> list[Result]:
    """The newest result of each theme on each chip, by chip."""
    results = [_result(path) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.rpartition("_")[2])]
    results = [result for result in results if result.theme in SECTIONS]  # others are for reading as they are
    # Some files do not name the processor. Where all others of that day are of one, it was that one.
    of_day: dict[str, set] = {}
    for result in results:
        if result.chip:
            of_day.setdefault(result.date, set()).add((result.chip, result.kind))
    placed = []
    for result in results:
        if not result.chip and len(of_day.get(result.date, ())) == 1:
            [(chip, kind)] = of_day[result.date]
            result = Result(result.path, result.data, chip, kind)
        placed.append(result)
    return list({(result.chip, result.kind, result.what): result for result in placed}.values())


def _result(path: Path) -> Result:
    data = json.loads(path.read_text(encoding="utf-8"))
    machine = data.get("machine_info") or data.get("machine") or {}
    cpu = machine.get("cpu", "")
    chip = machine.get("gpu") or (cpu["brand_raw"] if isinstance(cpu, dict) else cpu)
    if "gpu" in machine:
        return Result(path, data, chip, chip)
    if machine.get("amx_bf16"):
        return Result(path, data, chip, AMX)
    return Result(path, data, chip, AVX512 if machine.get("capability", "AVX512") == "AVX512" else AVX2)


def summary(results: list[Result]) -> str:
    """The README's one table: ratios, a column for each kind of machine."""
    kinds = [AMX, AVX512, *sorted({result.kind for result in results} - {AMX, AVX512})]
    if {*kinds} <= {AMX, AVX512, AVX2}:
        kinds.append(GPU)
    rows: dict[str, dict[str, str]] = {}
    order = list(SECTIONS)
    for result in sorted(results, key=lambda result: (order.index(result.theme), result.what, result.date)):
        for label, cell in _cells(result):
            rows.setdefault(label, {})[result.kind] = cell
    measured = {result.kind: f"{result.chip}, {result.date}" for result in results if result.chip}
    heads = [f"{kind}<br>{measured[kind]}" if kind in measured else kind for kind in kinds]
    lines = ["| times as fast | " + " | ".join(heads) + " |", "|---" * (len(kinds) + 1) + "|"]
    for label, cells in rows.items():
        lines.append("| " + " | ".join([label, *(cells.get(kind, NOT_YET) for kind in kinds)]) + " |")
    return "\n".join(lines) if rows else ""


def _cells(result: Result) -> Iterator[tuple[str, str]]:
    """(row, ratio) pairs that a result gives to the README's table; none without a C++ compiler."""
    if not result.data.get("machine", {}).get("cpp_compiler", True):
        return
    if result.theme == "ladder" and result.data["settings"]["model"] == SDXL_RANDOM:
        settings = result.data["settings"]
        measure, (width, height) = settings["measures"][0], settings["size"]
        batch = "" if settings["batch"] == 1 else f", batch {settings['batch']}"
        for rung, against, label in (
            ("exact", REFERENCE, '`"exact"`, lossless, beside stock'),
            ("balanced", REFERENCE, "default, beside stock"),
            ("balanced", RECIPE, "default, beside the guide's `torch.compile`"),
            ("openvino", REFERENCE, "OpenVINO, beside stock"),
            ("zentorch", REFERENCE, "AMD's zentorch, beside stock"),
        ):
            found = result.data["rungs"].get(rung, {}).get("ratios", {}).get(measure, {}).get(against)
            if found is not None:
                yield f"{UNITS[measure]}, {width}x{height}{batch}{_steps(settings)}: {label}", ratio(found)
    if result.theme == "lora":
        for run in result.data["benchmarks"]:
            if "stock_ratio" in run["extra_info"]:
                (middle, low, high), side = run["extra_info"]["stock_ratio"], run["params"]["size"]
                label = f"UNet step, {side}x{side}: default with a LoRA, beside stock with it"
                yield label, f"{middle:.2f} ({low:.2f}-{high:.2f})"
    if result.theme == "lossy":
        for run in result.data["benchmarks"]:
            info = run["extra_info"]
            cell = f"{info['ratio_median']:.2f} ({info['ratio_min']:.2f}-{info['ratio_max']:.2f})"
            yield f"`{info['options']}`, lossy, beside the same without", cell


def _steps(settings: dict) -> str:
    if settings["measures"][0] != "picture":
        return ""
    return f", {settings['steps']} steps {guidance(settings)}"


def long_tables(results: list[Result]) -> str:
    """The body of `benchmarks/README.md`: by chip, and under it by theme."""
    parts = []
    for chip, kind in dict.fromkeys((result.chip, result.kind) for result in reversed(results)):
        own = [result for result in results if (result.chip, result.kind) == (chip, kind)]
        parts.append(f"## {chip or 'A processor that the files do not name'} ({kind})")
        for theme, section in SECTIONS.items():
            named = sorted((result for result in own if result.theme == theme), key=lambda result: result.what)
            parts += [section(result.path) for result in named]
    return "\n\n".join(parts)


def updated(text: str, section: str) -> str:
    """A file's text with what stands between its markers made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}{chr(10) if section else ''}{END}{after}"


def main() -> int:
    results = load()
    targets = {ROOT / "README.md": summary(results), ROOT / "benchmarks" / "README.md": long_tables(results)}
    for path, section in targets.items():
        current = path.read_text(encoding="utf-8")
        text = updated(current, section)
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif text != current:
            print(f"{path.relative_to(ROOT)} differs from the results: run benchmarks/readme.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
