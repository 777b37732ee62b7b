"""Reads and lints the series: `UPSTREAM`, `series` and the patches themselves. Touches no upstream source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAX_CHANGED_LINES = 150
STATUSES = ("Pending", "Submitted", "Accepted", "Denied", "Inappropriate")
SECTIONS = ("How to observe it:", "Measured effect:")
TRAILERS = ("Upstream-Status", "Base", "Contract", "Fastdiff-Room", "Remove-when")


class PatchError(Exception):
    """Something about the series is wrong; the message says what and where."""


@dataclass(frozen=True)
class Upstream:
    """The release that the series is for."""

    project: str
    version: str
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> Upstream:
        """Read `UPSTREAM`. Raises PatchError when a line is missing."""
        path = folder / "UPSTREAM"
        if not path.is_file():
            raise PatchError(f"{path} is missing: it names the release and the sha256 of its sdist")
        lines = path.read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(": ", 1) for line in lines if ": " in line)
        missing = [name for name in ("project", "version", "sha256") if not fields.get(name)]
        if missing:
            raise PatchError(f"UPSTREAM: no line '{missing[0]}: ...'")
        return cls(fields["project"], fields["version"], fields["sha256"].strip())


@dataclass(frozen=True)
class Patch:
    """One patch file of the series."""

    path: Path
    subject: str
    message: str
    trailers: dict[str, str]
    diff: str

    @classmethod
    def read(cls, path: Path) -> Patch:
        """Split a `git format-patch` file. Raises PatchError when it is none."""
        text = path.read_text(encoding="utf-8")
        head, found, rest = text.partition("\n\n")
        subject = re.search(r"^Subject: \[PATCH\] (.*(?:\n .*)*)", head, re.MULTILINE)
        message, has_diff, diff = rest.partition("\ndiff --git ")
        if not (text.startswith("From ") and found and subject and has_diff):
            raise PatchError(f"{path.name}: not made by git format-patch (From, Subject: [PATCH], message, diff)")
        message = message.rpartition("\n---\n")[0] or message
        last_paragraph = message.strip().split("\n\n")[-1]
        trailers = dict(re.findall(r"^([A-Z][A-Za-z-]+): (.*(?:\n .*)*)$", last_paragraph, re.MULTILINE))
        return cls(path, subject[1].replace("\n ", " "), message.strip(), trailers, "diff --git " + diff)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def changed_lines(self) -> int:
        """Lines added and removed."""
        return len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", self.diff, re.MULTILINE))

    @property
    def files(self) -> list[str]:
        """Paths that the patch changes, as they are afterwards."""
        return re.findall(r"^diff --git a/.* b/(.*)$", self.diff, re.MULTILINE)

    def contract(self, root: Path) -> Path:
        """The contract's path."""
        return root / self.trailers["Contract"]


def read_series(folder: Path) -> list[str]:
    """Names of the patches in order. Raises PatchError when `series` and the folder disagree."""
    path = folder / "series"
    if not path.is_file():
        raise PatchError(f"{path} is missing: it lists the patches in order")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    present = {file.name for file in folder.glob("*.patch")}
    for name in names:
        if name not in present:
            raise PatchError(f"series lists {name}, which is missing from {folder.name}/")
        if names.count(name) > 1:
            raise PatchError(f"series lists {name} twice")
    for name in sorted(present - set(names)):
        raise PatchError(f"{name} is in {folder.name}/ but series does not list it")
    return names


def lint(folder: Path) -> list[Patch]:
    """Check everything that needs no upstream source; returns the patches in order.

    Raises:
        PatchError: with all problems found, one a line.
    """
    upstream = Upstream.read(folder)
    patches = [Patch.read(folder / name) for name in read_series(folder)]
    problems = []
    for number, patch in enumerate(patches, start=1):
        found = _problems(patch, number, folder.parent, upstream)
        problems += [f"{patch.name}: {problem}" for problem in found]
    if problems:
        raise PatchError("\n".join(problems))
    return patches


def _problems(patch: Patch, number: int, root: Path, upstream: Upstream) -> list[str]:
    problems = []
    if not patch.name.startswith(f"{number:04d}-"):
        problems.append(f"is number {number} of the series: its name must begin with {number:04d}-")
    problems += [f"the message has no section '{s}'" for s in SECTIONS if f"\n{s}" not in patch.message]
    problems += [f"the message has no trailer '{t}:'" for t in TRAILERS if not patch.trailers.get(t)]
    if "TODO" in patch.subject + patch.message:
        problems.append("the message still has a TODO")
    status = patch.trailers.get("Upstream-Status", "").split(" ")
    if status[0] not in ("", *STATUSES):
        problems.append(f"Upstream-Status must begin with one of {', '.join(STATUSES)}")
    if status[0] in ("Submitted", "Accepted") and len(status) < 2:
        problems.append(f"Upstream-Status: {status[0]} needs the pull request or the release behind it")
    base = patch.trailers.get("Base")
    if base and base != f"{upstream.project} {upstream.version}":
        problems.append(f"Base is '{base}', but UPSTREAM is {upstream.project} {upstream.version}")
    for trailer in ("Contract", "Fastdiff-Room"):
        path = patch.trailers.get(trailer)
        if path and not (root / path).exists():
            problems.append(f"{trailer}: {path} does not exist")
    if patch.changed_lines > MAX_CHANGED_LINES:
        problems.append(f"changes {patch.changed_lines} lines; split it at {MAX_CHANGED_LINES}")
    outside = [file for file in patch.files if not file.startswith(("src/", "tests/"))]
    problems += [f"changes {file}, outside of src/ and tests/" for file in outside]
    if not any(f.startswith("tests/") for f in patch.files):
        problems.append("brings no test under tests/")
    return problems
