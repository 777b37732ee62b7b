"""The waterfall: how each rung of the ladder shortens the time."""

from __future__ import annotations

from pathlib import Path

from .machine import describe
from .settings import REFERENCE
from .table import seconds, shown_rungs, title

_COLOURS = {"stock": "#8a93a3", "fastdiff": "#d1495b", "peer": "#c9ced6"}
_LEGEND = {"stock": "stock diffusers", "fastdiff": "fastdiff", "peer": "other ways to compile the same model"}
_SAVED = "#f0f1f4"


def draw(results: dict, path: Path) -> None:
    """Write the picture; the suffix of `path` says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rungs = shown_rungs(results)
    measure = results["settings"]["measures"][0]
    medians = [rung["times"][measure]["median"] for rung in rungs]
    figure = Figure(figsize=(10, 1.7 + 0.44 * len(rungs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(rung["times"][measure]["max"] for rung in rungs)
    previous = None
    for row, (rung, median) in enumerate(zip(rungs, medians, strict=True)):
        times = rung["times"][measure]
        if previous is not None and previous > median and rung["kind"] != "peer":
            axes.barh(row, previous - median, left=median, color=_SAVED, height=0.66)
        axes.barh(row, median, color=_COLOURS[rung["kind"]], height=0.66)
        axes.plot([times["min"], times["max"]], [row, row], color="#333333", linewidth=1.1)
        for end in ("min", "max"):
            axes.plot([times[end]] * 2, [row - 0.14, row + 0.14], color="#333333", linewidth=1.1)
        ratio = rung["ratios"][measure][REFERENCE]["median"]
        right = max(times["max"], previous or 0 if rung["kind"] != "peer" else 0)
        factor = "  (= 1)" if rung is results["rungs"].get(REFERENCE) else f"  ({ratio:.2f}x)"
        axes.text(right + longest * 0.012, row, seconds(median) + factor, va="center", fontsize=9)
        previous = median
    axes.set_yticks(range(len(rungs)), [rung["label"] for rung in rungs], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds, median; whiskers: least and greatest; in brackets: speed relative to stock's default")
    axes.xaxis.label.set_size(8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    kinds = [kind for kind in _COLOURS if any(rung["kind"] == kind for rung in rungs)]
    handles = [Patch(color=_COLOURS[kind], label=_LEGEND[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    figure.suptitle(f"{title(results)}\n{describe(results['machine'])}; {results['date']}", fontsize=10)
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
