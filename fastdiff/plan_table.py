"""The plan as notebooks show it."""

from __future__ import annotations

import html


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
