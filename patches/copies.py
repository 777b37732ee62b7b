"""Upstream's rule for `# Copied from`: such a function or class equals its original, renamings aside."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_COMMENT = re.compile(r"^ *# Copied from \w+\.([\w.]+)(?: with (.*))?$")


def inconsistent_copies(source: Path) -> set[str]:
    """Every `# Copied from` in the package `source` whose code is not that of its original."""
    files: dict[Path, str] = {path: path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py"))}
    wrong = set()
    for path, text in files.items():
        lines = text.splitlines()
        for number, line in enumerate(lines):
            comment = _COMMENT.match(line)
            if comment is None:
                continue
            original = _find(source, files, comment[1])
            copy = _block_at(lines, number + 1)
            if original is None or copy is None or _normal(_rename(original, comment[2])) != _normal(copy):
                wrong.add(f"{path.relative_to(source)}: {line.strip()}")
    return wrong


def _find(source: Path, files: dict[Path, str], name: str) -> str | None:
    """The code of `models.unets.unet_2d_condition.UNet2DConditionModel.forward` and the like."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = source.joinpath(*parts[:length]).with_suffix(".py")
        if path in files:
            lines = files[path].splitlines()
            start, indent = 0, ""
            for part in parts[length:]:
                pattern = re.compile(rf"{indent}(?:class|def|async def) {part}\b")
                start = next((i for i in range(start, len(lines)) if pattern.match(lines[i])), None)
                if start is None:
                    return None
                indent += "    "
            return _block_at(lines, start)
    return None


def _block_at(lines: list[str], start: int) -> str | None:
    """The function or class whose first line, or decorator, is `lines[start]`, dedented."""
    while start < len(lines) and lines[start].lstrip().startswith("@"):
        start += 1
    if start >= len(lines):
        return None
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and (
        not lines[end].strip()
        or len(lines[end]) - len(lines[end].lstrip()) > indent
        or lines[end].strip().startswith(")")
    ):
        end += 1
    return "\n".join(line[indent:] for line in lines[start:end])


def _rename(code: str, renamings: str | None) -> str:
    for renaming in (renamings or "").split(","):
        old, arrow, new = renaming.strip().partition("->")
        if arrow:
            code = code.replace(old.strip(), new.strip().split(" ")[0])
    return code


def _normal(code: str) -> str | None:
    """The code without comments and layout."""
    try:
        return ast.dump(ast.parse(code))
    except SyntaxError:
        return None
