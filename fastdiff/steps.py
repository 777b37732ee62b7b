"""What a plan did, step by step, and the table that tells of it."""

from __future__ import annotations

import html
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanStep:
    """One step of the plan.

    Attributes:
        name: what is done.
        applied: whether it is done on this machine with this configuration.
        reason: why, or why not.
        lossless: whether results equal stock's within rounding.
    """

    name: str
    applied: bool
    reason: str
    lossless: bool = True


def format_plan(steps: list[PlanStep], header: str) -> str:
    """Render steps as a table: mark, name, lossless or lossy, reason."""
    width = max(len(step.name) for step in steps)
    rows = [header]
    for step in steps:
        kind = "lossless" if step.lossless else "lossy"
        rows.append(f"  {'on ' if step.applied else 'off'}  {step.name:<{width}}  {kind:<8}  {step.reason}")
    return "\n".join(rows)


class PlanTable(list):
    """The steps of a plan, in order; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        heads = ("", "step", "", "why")
        rows = [
            ("on" if step.applied else "off", step.name, "lossless" if step.lossless else "lossy", step.reason)
            for step in self
        ]
        cells = ["".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) for row in rows]
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in heads)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
