"""The steps of a plan, and how they are shown."""

from __future__ import annotations

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
