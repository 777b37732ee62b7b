#!/usr/bin/env python3
"""Checks, applies and renews the patches in this folder.

Needs Python and git alone; the contracts that `check` runs need what the tests of fastdiff need.

python patches/apply.py check                 everything: lint, exact application, copies, contracts
python patches/apply.py apply --to DIR        the series as commits on your own checkout of the release
python patches/apply.py refresh [--from DIR]  write the patches anew, from themselves or from commits in DIR
python patches/apply.py new NAME              a tree to write the next patch in, and a contract to fill
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from check import CONTRACTS, FOLDER, ROOT, check, say
from series_file import Patch, PatchError, Upstream, lint, read_series
from upstream_tree import BASE_TAG, Tree, fetch_sdist

TEMPLATE = """TODO: what changes, in the imperative

TODO: why, for somebody who has never heard of fastdiff.

How to observe it: TODO

Measured effect: TODO

Upstream-Status: Pending
Base: {project} {version}
Contract: tests/contracts/test_{name}.py
Fastdiff-Room: TODO
Remove-when: TODO
"""
CONTRACT = '''"""TODO: what somebody gains, in one sentence."""

import pytest
from legs import LEG


def test_{name}():
    pytest.fail("TODO: write what holds with the patch, and with fastdiff")
'''


def apply(target: Path, sdist_version: Upstream) -> None:
    """Put the series on a checkout, as commits; on any problem the checkout is left as it was."""
    patches = lint(FOLDER)
    tree = Tree(target, neutral=False)
    version_file = target / "src" / sdist_version.project / "__init__.py"
    top = tree.git("rev-parse", "--show-toplevel", check=False) if target.is_dir() else None
    if top is None or top.returncode != 0 or Path(top.stdout.strip()) != target.resolve():
        raise PatchError(f"{target} is not the top of a git checkout; clone upstream, or use: apply.py new NAME")
    if not version_file.is_file():
        raise PatchError(f"{target} has no src/{sdist_version.project}/__init__.py: not a checkout of upstream")
    if f'__version__ = "{sdist_version.version}"' not in version_file.read_text(encoding="utf-8"):
        raise PatchError(f"{target} is not at {sdist_version.version}; check out the release first")
    if tree.git("status", "--porcelain").stdout.strip():
        raise PatchError(f"{target} has changes that are not committed; commit or stash them first")
    start = tree.git("rev-parse", "HEAD").stdout.strip()
    try:
        for patch in patches:
            tree.apply(patch)
    except BaseException:
        tree.git("am", "--abort", check=False)
        tree.git("reset", "--quiet", "--keep", start)
        raise
    say(f"{len(patches)} commits on {start[:12]} in {target}")


def refresh(source: Path | None, base: str, sdist: Path | None) -> None:
    """Write the patch files and `series` anew."""
    with tempfile.TemporaryDirectory(prefix="fastdiff-patches-") as scratch:
        target = Path(scratch) / "exported"
        if source is None:
            tree = Tree.create(fetch_sdist(Upstream.read(FOLDER), sdist), Path(scratch) / "tree")
            for name in read_series(FOLDER):
                tree.apply(Patch.read(FOLDER / name))
        else:
            tree = Tree(source)
            if tree.git("rev-parse", "--verify", "--quiet", base, check=False).returncode != 0:
                raise PatchError(f"{source} has no {base}; name the commit before the first patch with --base")
        names = tree.export(target, base)
        if not names:
            raise PatchError(f"no commits after {base}: nothing to export")
        for name in names:
            Patch.read(target / name)  # refuses an empty commit
        old = {path.name: path.read_bytes() for path in FOLDER.glob("*.patch")}
        new = {name: (target / name).read_bytes() for name in names}
        for name in old.keys() - new.keys():
            (FOLDER / name).unlink()
            say(f"removed {name}")
        for name, data in new.items():
            (FOLDER / name).write_bytes(data)
            say(f"{'unchanged' if old.get(name) == data else 'wrote'} {name}")
        (FOLDER / "series").write_text("\n".join(names) + "\n", encoding="utf-8")
    lint(FOLDER)


def new(name: str, target: Path | None, sdist: Path | None) -> None:
    """Make a tree with the series on it and an empty commit to fill, and a contract."""
    if not name.isidentifier():
        raise PatchError(f"NAME must be like a Python name, for tests/contracts/test_NAME.py; got {name!r}")
    upstream = Upstream.read(FOLDER)
    target = target or Path(tempfile.mkdtemp(prefix=f"{upstream.project}-{name}-"))
    tree = Tree.create(fetch_sdist(upstream, sdist), target)
    for listed in read_series(FOLDER):
        tree.apply(Patch.read(FOLDER / listed))
    message = TEMPLATE.format(project=upstream.project, version=upstream.version, name=name)
    Tree(target, neutral=False).git("commit", "--quiet", "--allow-empty", "--message", message)
    contract = CONTRACTS / f"test_{name}.py"
    if not contract.exists():
        contract.write_text(CONTRACT.format(name=name), encoding="utf-8")
    say(f"1. change the source in {target}, with a test under its tests/")
    say("2. git commit --all --amend there, and fill in the message")
    say(f"3. write {contract.relative_to(ROOT)}")
    say(f"4. python patches/apply.py refresh --from {target}, then check")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="apply.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    with_sdist = argparse.ArgumentParser(add_help=False)
    with_sdist.add_argument("--sdist", type=Path, help="upstream's sdist, instead of the cached or downloaded one")
    one = commands.add_parser("check", parents=[with_sdist], help="prove the series")
    one.add_argument("--no-contracts", action="store_true", help="only lint, application, export and copies (quick)")
    one = commands.add_parser("apply", help="commit the series onto your own checkout")
    one.add_argument("--to", type=Path, required=True, metavar="DIR", help="a clean git checkout of the release")
    one = commands.add_parser("refresh", parents=[with_sdist], help="write the patch files anew")
    one.add_argument("--from", dest="source", type=Path, metavar="DIR", help="a tree whose commits are the series")
    one.add_argument("--base", default=BASE_TAG, help=f"the commit before the first patch ({BASE_TAG})")
    one = commands.add_parser("new", parents=[with_sdist], help="begin a patch")
    one.add_argument("name", metavar="NAME", help="name of the contract, like a Python name")
    one.add_argument("--to", type=Path, metavar="DIR", help="where to make the tree (a new temporary folder)")
    given = parser.parse_args(arguments)
    try:
        if given.command == "check":
            check(given.sdist, not given.no_contracts)
        elif given.command == "apply":
            apply(given.to, Upstream.read(FOLDER))
        elif given.command == "refresh":
            refresh(given.source, given.base, given.sdist)
        else:
            new(given.name, given.to, given.sdist)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
