"""`apply.py check`: what has to be true of the series."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from copies import inconsistent_copies
from prove import require_failure, require_pass, run_script, run_tests
from series_file import Patch, PatchError, Upstream, lint
from upstream_tree import BASE_TAG, Tree, apply_with_patch, contents, fetch_sdist, unpack

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
CONTRACTS = ROOT / "tests" / "contracts"


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def check(sdist: Path | None, contracts: bool) -> None:
    """Prove the series. Raises PatchError at the first thing that is wrong."""
    upstream, patches = Upstream.read(FOLDER), lint(FOLDER)
    say(f"lint: {len(patches)} patches on {upstream.project} {upstream.version}")
    archive = fetch_sdist(upstream, sdist)
    say(f"sdist: {archive.name} has the sha256 of UPSTREAM")
    with tempfile.TemporaryDirectory(prefix="fastdiff-patches-") as scratch:
        work = Path(scratch)
        tree = Tree.create(archive, work / "tree")
        by_patch = unpack(archive, work / "by_patch")
        for patch in patches:
            tree.apply(patch)
            if shutil.which("patch"):
                apply_with_patch(by_patch, patch)
        if shutil.which("patch") and contents(tree.path) != contents(by_patch):
            raise PatchError("git am and patch -F0 give different trees")
        say(f"apply: all {len(patches)} with git am" + (" and patch -F0" if shutil.which("patch") else ""))
        check_export(tree, patches, work / "exported")
        pristine = unpack(archive, work / "pristine")
        check_copies(*(path / "src" / upstream.project for path in (pristine, tree.path)))
        if contracts:
            prove_each(tree, patches)
            prove_all(pristine, tree.path, patches, work)
    say("all good")


def prove_each(tree: Tree, patches: list[Patch]) -> None:
    """Each patch's contract fails on the tree before it, and passes on the tree after it."""
    commits = tree.git("rev-list", "--reverse", f"{BASE_TAG}..HEAD").stdout.split()
    for applied, commit in enumerate([BASE_TAG, *commits]):
        tree.git("checkout", "--quiet", commit)
        near = patches[max(applied - 1, 0) : applied + 1]
        outcomes = run_tests(tree.path, {patch.contract(ROOT) for patch in near}, CONTRACTS)
        for patch in near:
            test = patch.contract(ROOT)
            outcome = outcomes[test.stem]
            if patches.index(patch) < applied:
                require_pass(patch.name, test, outcome)
                say(f"contract: {test.name} passes with {patch.name} ({outcome.passed} tests)")
            else:
                require_failure(patch.name, test, outcome)
                say(f"contract: {test.name} fails without {patch.name} ({outcome.failed} tests)")


def check_export(tree: Tree, patches: list[Patch], target: Path) -> None:
    """What git writes out again is what is committed here."""
    exported = tree.export(target)
    for patch, name in zip(patches, exported, strict=True):
        if name != patch.name or (target / name).read_bytes() != patch.path.read_bytes():
            raise PatchError(f"{patch.name} is not what git exports ({name}); run: apply.py refresh")
    say("export: equals the committed files")


def check_copies(before: Path, after: Path) -> None:
    """No `# Copied from` that was true in the package before is false after."""
    broken = inconsistent_copies(after) - inconsistent_copies(before)
    if broken:
        raise PatchError("copies that no longer equal their original:\n  " + "\n  ".join(sorted(broken)))
    say("copies: every '# Copied from' still holds")


def prove_all(pristine: Path, patched: Path, patches: list[Patch], work: Path) -> None:
    """With the whole series: all contracts, the tests that the patches bring, the pictures of stock pipelines."""
    contracts = {patch.contract(ROOT) for patch in patches}
    brought = {patched / file for patch in patches for file in patch.files if file.startswith("tests/")}
    for files, folder in ((contracts, CONTRACTS), (brought, patched / "tests")):
        outcomes = run_tests(patched, files, folder)
        for file in files:
            require_pass("the whole series", file, outcomes[file.stem])
    say(f"series: {len(contracts)} contracts and {len(brought)} upstream test files pass on the whole of it")
    script = CONTRACTS / "stock_pictures.py"
    if script.is_file():
        before, after = (run_script(t, script, work / f"{t.name}.bin") for t in (pristine, patched))
        if before != after:
            raise PatchError("stock pipelines draw other pictures on the patched tree")
        say("pictures: stock pipelines draw bit for bit the same")
