"""The waterfall: how each rung of the ladder shortens the time."""

from __future__ import annotations

from pathlib import Path

from .machine import describe
from .settings import REFERENCE
from .table import seconds, shown_rungs, title

_COLOURS = {"stock": "#8a93a3", "fastdiff": "#d1495b", "peer": "#c9ced6"}
_LEGEND = {"stock": "stock diffusers", "fastdiff": "fastdiff", "peer": "others"}
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
    figure = Figure(figsize=(10, 1.7 + 0.44 * len(rungs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Stock's share of the same rounds, not the seconds: those were taken at different moments of a machine whose
    # speed may have changed.
    shares = [_share(rung["ratios"][measure][REFERENCE]) for rung in rungs]
    longest = max(greatest for _, _, greatest in shares)
    previous = 0.0
    for row, (rung, (least, median, greatest)) in enumerate(zip(rungs, shares, strict=True)):
        if rung["kind"] == "peer":
            previous = 0.0
        axes.barh(row, max(previous - median, 0), left=median, color=_SAVED, height=0.66)
        axes.barh(row, median, color=_COLOURS[rung["kind"]], height=0.66)
        axes.plot([least, greatest], [row, row], color="#333333", linewidth=1.1)
        for end in (least, greatest):
            axes.plot([end, end], [row - 0.14, row + 0.14], color="#333333", linewidth=1.1)
        text = f"{1 / median:.2f}x   {seconds(rung['times'][measure]['median'])}"
        axes.text(max(greatest, previous) + longest * 0.012, row, text, va="center", fontsize=9)
        previous = median
    axes.set_yticks(range(len(rungs)), [rung["label"] for rung in rungs], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.15)
    axes.set_xlabel("time relative to stock's default, timed in turn with it; median, least and greatest of the rounds")
    axes.xaxis.label.set_fontsize(8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    kinds = [kind for kind in _COLOURS if any(rung["kind"] == kind for rung in rungs)]
    handles = [Patch(color=_COLOURS[kind], label=_LEGEND[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    figure.suptitle(f"{title(results)}\n{describe(results['machine'])}; {results['date']}", fontsize=10)
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def _share(ratio: dict) -> tuple[float, float, float]:
    """Least, median and greatest time, with stock's as 1, of a ratio stock / this."""
    return 1 / ratio["max"], 1 / ratio["median"], 1 / ratio["min"]
