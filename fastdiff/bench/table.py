"""The ladder's results as text."""

from __future__ import annotations

from .machine import describe
from .settings import RECIPE, REFERENCE

_FEWEST_ROUNDS = 3
UNITS = {"step": "UNet step", "vae": "VAE decode", "picture": "picture"}


def title(results: dict) -> str:
    """What was measured, in one line."""
    settings = results["settings"]
    width, height = settings["size"]
    parts = [settings["model"], f"{width}x{height}", f"batch {settings['batch']} {guidance(settings)}"]
    if settings["measures"][0] == "picture":
        parts.append(f"{settings['steps']} steps")
    if settings["dtype"] != "bfloat16":
        parts.append(settings["dtype"])
    if not results["machine"].get("cpp_compiler", True):
        parts.append("without a C++ compiler")
    return f"{UNITS[settings['measures'][0]]}: " + ", ".join(parts)


def shown_rungs(results: dict) -> list[dict]:
    """The rungs that were timed, in order."""
    return [rung for rung in results["rungs"].values() if "times" in rung]


def table(results: dict) -> str:
    """Times, ratios to stock and to the documented recipe, set-up (building, compiling), memory and error."""
    measure = results["settings"]["measures"][0]
    header = ("", "time", "least - greatest", "stock / this", "recipe / this", "set-up", "memory", "error")
    rows = [header]
    for rung in shown_rungs(results):
        times, ratios = rung["times"][measure], rung["ratios"][measure]
        memory = rung.get("memory")
        rows.append(
            (
                rung["label"] + (" *" if "same_as" in rung else ""),
                seconds(times["median"]),
                f"{seconds(times['min'])} - {seconds(times['max'])}",
                ratio(ratios.get(REFERENCE)),
                ratio(ratios.get(RECIPE)),
                f"{sum(rung['setup_s'].values()):.0f} s",
                size(sum(memory.values())) if memory else "-",
                f"{rung['errors'][measure]:.1e}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [title(results), describe(results["machine"]), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    reference = results["rungs"].get(REFERENCE, {})
    if "ratios" in reference:
        noise = reference["ratios"][measure][REFERENCE]
        lines.append(
            f"Ratios are medians over rounds, least to greatest in brackets. Stock against itself: {ratio(noise)}. "
            "Error: relative distance from stock's result."
        )
    unclear = [
        rung["label"]
        for name, rung in results["rungs"].items()
        if name != REFERENCE and "times" in rung and shows_nothing(rung["ratios"][measure].get(REFERENCE))
    ]
    if unclear:
        why = "for too few rounds, or a spread that has 1 within it"
        lines.append(f"No result beside stock, {why}: {'; '.join(unclear)}.")
    for rung in results["rungs"].values():
        if "same_as" in rung:
            lines.append(f"* {rung['label']} applies the same here as {results['rungs'][rung['same_as']]['label']}.")
        if "missing" in rung:
            lines.append(f"{rung['label']}: {rung['missing']}")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A duration with three digits."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def size(count: int) -> str:
    """Bytes in GiB, or in MiB where that says more."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def shows_nothing(spread: dict | None) -> bool:
    """Whether a ratio says neither faster nor slower: it spreads over 1, or comes from fewer rounds than can tell."""
    return spread is not None and (spread["min"] <= 1 <= spread["max"] or len(spread["all"]) < _FEWEST_ROUNDS)


def ratio(spread: dict | None) -> str:
    """Median with least and greatest; a dash for what was not measured."""
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"


def guidance(settings: dict) -> str:
    """Whether a run was with classifier-free guidance, in words; older results, which do not say, all were."""
    return "with guidance" if settings.get("guidance", 5.0) > 1 else "without guidance"
