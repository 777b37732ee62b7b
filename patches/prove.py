"""Runs contracts and scripts against a patched tree, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from series_file import PatchError


@dataclass
class Outcome:
    """What became of the tests of one file."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


def tree_environment(tree: Path) -> dict[str, str]:
    """The environment in which `import diffusers` finds `tree`, and contracts run their patched leg."""
    paths = [str(tree / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "FASTDIFF_PATCHED_TREE": str(tree),
        "HF_HUB_OFFLINE": "1",
    }


def run_tests(tree: Path, files: Iterable[Path], folder: Path) -> dict[str, Outcome]:
    """Run test files of `folder` against a tree.

    Args:
        tree: an upstream source tree.
        files: the files to run.
        folder: no `conftest.py` above it is read.

    Returns:
        What became of each file, by its stem.

    Raises:
        PatchError: pytest could not run them: a file does not import, pytest or torch is not installed.
    """
    files = list(files)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "--show-capture=no",
            f"--junit-xml={report}",
        ]
        command = [sys.executable, "-m", "pytest", *options, "--confcutdir", folder, "--rootdir", folder]
        done = subprocess.run(
            [*command, *files], cwd=scratch, env=tree_environment(tree), capture_output=True, text=True
        )
        if done.returncode not in (0, 1):
            raise PatchError(f"the tests could not run on {tree.name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        outcomes = {file.stem: Outcome() for file in files}
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = outcomes[case.get("classname", "").split(".")[-1]]
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                outcome.failed += 1
            elif "skipped" in kinds:
                outcome.skipped += 1
            else:
                outcome.passed += 1
    return outcomes


def require_pass(name: str, test: Path, outcome: Outcome) -> None:
    """Raise PatchError unless all tests of a file ran and passed."""
    if outcome.failed or not outcome.passed:
        raise PatchError(
            f"{name}: {test.name} must pass with the patch, "
            f"but {outcome.failed} of {outcome.failed + outcome.passed} tests fail"
        )


def require_failure(name: str, test: Path, outcome: Outcome) -> None:
    """Raise PatchError unless a test of a file failed."""
    if not outcome.failed:
        raise PatchError(f"{name}: {test.name} passes without the patch, so it proves nothing; make it fail there")


def run_script(tree: Path, script: Path, output: Path) -> bytes:
    """Run a script that writes one file; returns what it wrote. Raises PatchError when it fails."""
    done = subprocess.run([sys.executable, script, output], env=tree_environment(tree), capture_output=True, text=True)
    if done.returncode != 0:
        raise PatchError(f"{script.name} failed on {tree.name}:\n{done.stderr[-2000:]}")
    return output.read_bytes()
