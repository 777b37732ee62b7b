"""The house: who may import whom, that nothing imports in a circle, and how long a module may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastdiff

HOUSE = Path(fastdiff.__file__).parent
# Every room, and what it may import beside itself. The modules that stand beside the rooms are rooms of one file.
MAY_IMPORT = {
    "cache": set(),
    "config": set(),
    "errors": set(),
    "checkpoint": set(),
    "limits": set(),
    "quiet": set(),
    "failures": {"config"},
    "heap": set(),
    "identity": set(),
    "native": {"cache"},
    "models": {"identity", "native"},
    "schedulers": {"identity"},
    "lossy": {"config"},
    "weights": {"models", "native"},
    "tuning": {"cache"},
    "compiler": {"failures", "models"},
    "graphs": {"failures", "models"},
    "shapes": set(),
    "steps": set(),
}
LOW = set(MAY_IMPORT)
MAY_IMPORT["choices"] = {"config", "models", "tuning", "weights"}
MAY_IMPORT["attention_choice"] = {"choices", "models", "tuning"}
MAY_IMPORT["weight_steps"] = {*LOW, "choices"}
MAY_IMPORT["plan"] = {*LOW, "weight_steps", "choices", "attention_choice"}
MAY_IMPORT["pipelines"] = {*LOW, "plan", "weight_steps", "choices"}
MAY_IMPORT["shapes.training"] = {*LOW, "plan", "pipelines"}
MAY_IMPORT["bench"] = MAY_IMPORT["scale"] = {*LOW, "choices", "plan", "pipelines", "shapes.training"}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "cli"}
LONGEST = 300

MODULES = {
    path.relative_to(HOUSE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
}


def room(module: str) -> str:
    """The room of a module, given below the package: `models.unet` is in `models`."""
    return "shapes.training" if module.startswith("shapes.training") else module.split(".")[0]


def imported(module: str) -> set[str]:
    """The modules of the house that a module imports, at its top or on the way."""
    path, found = MODULES[module], set()
    package = ["fastdiff", *module.split(".")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (path.name == "__init__.py")
            base = package[: len(package) - up] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            whole = [f"{stem}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("fastdiff.") in MODULES else stem for name in whole]
        else:
            continue
        below = {name.removeprefix("fastdiff.") for name in names if name.startswith("fastdiff.")}
        found |= {name for name in below if name in MODULES}
    return found - {module}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_point_down(module):
    allowed = MAY_IMPORT[room(module)] | {room(module)}
    wrong = {name for name in imported(module) if room(name) not in allowed}
    assert not wrong, f"{module} may import {', '.join(sorted(allowed))}, and imports {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_in_a_circle():
    rest = {module: imported(module) - {"__init__"} for module in MODULES if module != "__init__"}
    while ready := {module for module, needed in rest.items() if not needed & rest.keys()}:
        rest = {module: needed for module, needed in rest.items() if module not in ready}
    assert not rest, f"these modules import each other in a circle: {', '.join(sorted(rest))}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{module} has {lines} lines: split it by meaning"


def test_every_room_is_known():
    assert {room(module) for module in MODULES} - {"__init__"} == set(MAY_IMPORT)


def test_every_room_is_shown_to_contributors():
    shown = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    entries = {f"{path.name}/" for path in HOUSE.iterdir() if (path / "__init__.py").exists()}
    entries |= {path.name for path in HOUSE.glob("[!_]*.py")}
    missing = entries - set(re.findall(r"[ ,]([a-z_]+(?:/|\.py))(?=[ ,\n])", shown))
    assert not missing, f"CONTRIBUTING.md, 'The house', has no line for {', '.join(sorted(missing))}"
