#!/usr/bin/env python3
"""Proves the patches: each alone on the bare release, and all of them together. Prints what holds; some minutes.

python patches/check.py                    on the sdist of the release, which carries no tests or docs of upstream
python patches/check.py --upstream CLONE   on a clone of diffusers: also the docs, upstream's tests and its copies
python patches/check.py 0005 0011          only these patches
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parent
CONTRACTS = FOLDER.parent / "tests" / "contracts"
# Tests of a contract that hold without the patch too: what it must not break.
HOLDS_BEFORE = "test_still_"


class PatchError(Exception):
    """Something does not hold; the message says what."""


@dataclass(frozen=True)
class Patch:
    """A patch file, and the contract that fails without it."""

    path: Path
    contract: Path

    @property
    def files(self) -> list[str]:
        """Paths that the patch changes."""
        return re.findall(r"^diff --git a/.* b/(.*)$", self.path.read_text(encoding="utf-8"), re.MULTILINE)

    @property
    def in_sdist(self) -> bool:
        """Whether it changes the package itself, which is all that an sdist carries."""
        return any(file.startswith("src/") for file in self.files)


def read_series(folder: Path = FOLDER) -> list[Patch]:
    """The patches in order. Raises PatchError when `series`, the folder and the contracts disagree."""
    lines = (folder / "series").read_text(encoding="utf-8").split("\n")
    patches = [Patch(folder / name, CONTRACTS / contract) for name, contract in map(str.split, filter(None, lines))]
    listed = {patch.path for patch in patches} | {folder / f"{patch.path.name[:4]}.md" for patch in patches}
    listed |= {patch.contract for patch in patches}
    present = {*folder.glob("*.patch"), *folder.glob("[0-9]*.md")}
    if missing := sorted(path.name for path in listed if not path.exists()) + sorted(p.name for p in present - listed):
        raise PatchError(f"listed in series and missing, or present and not listed: {', '.join(missing)}")
    return patches


def fetch_sdist() -> Path:
    """The release's sdist, from the cache or through pip. Raises PatchError when it cannot be had, or is another."""
    upstream = dict(line.split(": ") for line in (FOLDER / "UPSTREAM").read_text().splitlines())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff" / "upstream"
    sdist = cache / f"{upstream['project']}-{upstream['version']}.tar.gz"
    if not sdist.is_file():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--retries", "1", "--timeout", "20", "--no-deps"]
        wanted = ["--no-binary", ":all:", "--dest", str(cache), f"{upstream['project']}=={upstream['version']}"]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode:
            raise PatchError(f"could not download {sdist.name} (put it into {cache}):\n{done.stderr[-1000:]}")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != upstream["sha256"]:
        raise PatchError(f"{sdist} has the sha256 {digest}, but UPSTREAM names {upstream['sha256']}")
    return sdist


class Tree:
    """A git working tree of upstream with the bare release at the tag `base`."""

    def __init__(self, path: Path, clone: Path | None = None):
        self.path, self.whole = path, clone is not None
        sdist = fetch_sdist()
        release = f"v{sdist.name.removesuffix('.tar.gz').rpartition('-')[2]}"
        with tarfile.open(sdist) as archive, tempfile.TemporaryDirectory() as scratch:
            archive.extractall(scratch, filter="data")
            (unpacked,) = Path(scratch).iterdir()
            if clone is None:
                shutil.move(unpacked, path)
                self.git("init", "-q")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["git", "clone", "-q", "--shared", clone, path], check=True)
                if self.git("checkout", "-q", release, check=False).returncode:
                    # The release is not in the clone: its sources, between the tests and docs of the nearest commit.
                    shutil.rmtree(path / "src")
                    shutil.copytree(unpacked / "src", path / "src", ignore=shutil.ignore_patterns("*.egg-info"))
        self.git("add", "--all", *([] if self.whole else ["--force"]))
        self.git("commit", "-q", "--allow-empty", "-m", f"diffusers {release}")
        self.git("tag", "-f", "base")

    def git(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run git with no settings but these. Raises PatchError when it fails, unless told not to check."""
        names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **dict.fromkeys(names, "fastdiff")}
        settings = ["-c", "core.fileMode=false", "-c", "core.hooksPath=/dev/null"]
        done = subprocess.run(["git", *settings, *arguments], cwd=self.path, env=env, capture_output=True, text=True)
        if check and done.returncode:
            raise PatchError(f"git {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-2000:]}")
        return done

    def apply(self, patch: Patch) -> str:
        """Put one patch on the bare release, without fuzz; returns the commit."""
        self.git("checkout", "-q", "base")
        only = [] if self.whole else ["--include=src/*"]
        self.git("am", "-q", "--no-3way", "--whitespace=error", *only, str(patch.path))
        return self.git("rev-parse", "HEAD").stdout.strip()

    def apply_all(self, patches: list[Patch]) -> None:
        """Put all patches on the bare release: each applies to it exactly, and git merges them."""
        commits = [self.apply(patch) for patch in patches if self.whole or patch.in_sdist]
        self.git("checkout", "-q", "base")
        for commit in commits:
            self.git("cherry-pick", commit)


def environment(tree: Path) -> dict[str, str]:
    """In which `import diffusers` finds `tree`, and contracts run their patched leg."""
    path = os.pathsep.join(filter(None, [str(tree / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "FASTDIFF_PATCHED_TREE": str(tree), "HF_HUB_OFFLINE": "1"}


def run_tests(tree: Path, files: list[Path], folder: Path = CONTRACTS) -> dict[str, str]:
    """Run test files against a tree: "passed", "failed" or "skipped" for each test. Raises PatchError: cannot run."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--show-capture=no", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *options, "--confcutdir", folder, "--rootdir", folder, *files]
        done = subprocess.run(command, cwd=folder, env=environment(tree), capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise PatchError(f"the tests could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes[f"{case.get('classname')}.{case.get('name')}"] = outcome
    return outcomes


def require(outcomes: dict[str, str], wanted: str, when: str) -> int:
    """How many tests there are. Raises PatchError unless each has the wanted outcome."""
    wrong = [f"{test} {outcome}" for test, outcome in outcomes.items() if outcome != wanted]
    if wrong or not outcomes:
        raise PatchError(f"{when}, every test has to have {wanted}, but: {', '.join(wrong) or 'there is none'}")
    return len(outcomes)


def prove_before(tree: Tree, patches: list[Patch]) -> dict[Path, int]:
    """Every test of the contracts fails on the bare release; returns how many there are in each contract."""
    tree.git("checkout", "-q", "base")
    outcomes = run_tests(tree.path, [patch.contract for patch in patches])
    failed = {}
    for patch in patches:
        mine = {test: outcome for test, outcome in outcomes.items() if test.startswith(f"{patch.contract.stem}.")}
        still = {test: mine.pop(test) for test in list(mine) if f".{HOLDS_BEFORE}" in test}
        failed[patch.contract] = require(mine, "failed", f"without {patch.path.name}")
        if still:
            require(still, "passed", f"without {patch.path.name}")
    return failed


def prove_alone(tree: Tree, patch: Patch, failed: int) -> None:
    """The patch applies to the bare release, and its contract passes on the result."""
    tree.apply(patch)
    passed = require(run_tests(tree.path, [patch.contract]), "passed", f"with {patch.path.name}")
    if tree.whole:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = [sys.executable, "utils/check_copies.py"]
        done = subprocess.run(command, cwd=tree.path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        if done.returncode:
            raise PatchError(f"{patch.path.name} breaks copies:\n{done.stderr[-1000:]}")
    print(f"{patch.path.name}: {patch.contract.name} fails before in {failed} tests, passes in {passed}", flush=True)


def pictures(tree: Path) -> bytes:
    """The pictures that stock pipelines of a tree draw."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "pictures.bin"
        script = [sys.executable, CONTRACTS / "stock_pictures.py", output]
        subprocess.run(script, env=environment(tree), check=True, capture_output=True)
        return output.read_bytes()


def upstream_tests(bare: Tree, patched: Tree, patches: list[Patch]) -> None:
    """All of upstream's tests of the touched test files that pass on the bare release pass on the patched one."""
    files = sorted({file for patch in patches for file in patch.files if re.search(r"tests/.*/test_\w+\.py$", file)})
    for file in files:
        here = [
            run_tests(tree.path, [tree.path / file], tree.path)
            for tree in (bare, patched)
            if (tree.path / file).exists()
        ]
        after = {test for test, outcome in here[-1].items() if outcome == "passed"}
        before = {test for test, outcome in here[0].items() if outcome == "passed"} if len(here) > 1 else set()
        if before - after:
            raise PatchError(f"{file} no longer passes: {', '.join(sorted(before - after))}")
        print(f"{file}: {len(before)} pass before, {len(after)} after", flush=True)


def main() -> None:
    """Run the checks, printing what holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="numbers of patches, as 0005 (all)")
    parser.add_argument("--upstream", type=Path, metavar="CLONE", help="a git clone of diffusers")
    parser.add_argument("--no-upstream-tests", action="store_true", help="with a clone, do not run upstream's tests")
    given = parser.parse_args()
    everything = read_series()
    chosen = [patch for patch in everything if not given.numbers or patch.path.name[:4] in given.numbers]
    with tempfile.TemporaryDirectory(prefix="fastdiff-patches-") as scratch:
        tree, bare = Tree(Path(scratch) / "tree", given.upstream), Tree(Path(scratch) / "bare", given.upstream)
        for patch in chosen:
            if not (tree.whole or patch.in_sdist):
                print(f"{patch.path.name}: changes no file of the sdist; give a clone with --upstream", flush=True)
        chosen = [patch for patch in chosen if tree.whole or patch.in_sdist]
        failed = prove_before(tree, chosen)
        for patch in chosen:
            prove_alone(tree, patch, failed[patch.contract])
        tree.apply_all(everything)
        applied = [patch for patch in everything if tree.whole or patch.in_sdist]
        count = require(run_tests(tree.path, [p.contract for p in applied]), "passed", "with the whole series")
        print(f"series: {len(applied)} patches; all {count} tests of their contracts pass", flush=True)
        if pictures(bare.path) != pictures(tree.path):
            raise PatchError("stock pipelines draw other pictures on the patched tree")
        print("pictures: stock pipelines draw bit for bit the same", flush=True)
        if tree.whole and not given.no_upstream_tests:
            upstream_tests(bare, tree, chosen)


if __name__ == "__main__":
    try:
        main()
    except PatchError as error:
        sys.exit(f"error: {error}")
