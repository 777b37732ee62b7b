"""Upstream's source: the hash-checked sdist, unpacked into git trees; patches put on and taken out."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from series_file import Patch, PatchError, Upstream

BASE_TAG = "fastdiff-base"
# The same bytes on every machine, whatever the user's git is set to.
_EXPORT = ["--zero-commit", "--no-signature", "--no-stat", "--no-numbered", "--full-index", "--no-ext-diff"]
_NEUTRAL = [
    "diff.algorithm=myers",
    "diff.context=3",
    "diff.noprefix=false",
    "diff.renames=true",
    "core.autocrlf=false",
    "core.fileMode=false",  # the sdist has other modes than upstream's repository
    "core.hooksPath=/dev/null",
    "commit.gpgsign=false",
    "format.useAutoBase=false",
]


def cache_folder() -> Path:
    """Where downloaded sdists are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff" / "upstream"


def fetch_sdist(upstream: Upstream, given: Path | None = None) -> Path:
    """The path of upstream's sdist, its hash checked: `given`, the cached one, or a download through pip.

    Raises:
        PatchError: it cannot be had, or its hash is not that of `UPSTREAM`.
    """
    sdist = given or cache_folder() / f"{upstream.project}-{upstream.version}.tar.gz"
    if not sdist.is_file() and given is None:
        sdist.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--timeout", "20"]
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(sdist.parent)]
        done = _run([*pip, *options, f"{upstream.project}=={upstream.version}"])
        if done.returncode != 0 or not sdist.is_file():
            raise PatchError(f"could not download {sdist.name} (pass --sdist PATH):\n{_tail(done)}")
    if not sdist.is_file():
        raise PatchError(f"{sdist} does not exist")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != upstream.sha256:
        raise PatchError(f"{sdist} has the sha256 {digest}, but UPSTREAM names {upstream.sha256}")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack into a new `folder`; returns the path of the source tree, which is `folder` itself."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
        (inner,) = Path(scratch).iterdir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        _move(inner, folder)
    return folder


class Tree:
    """A git working tree of upstream's source."""

    def __init__(self, path: Path, neutral: bool = True):
        self.path = path
        self._settings = [item for setting in _NEUTRAL for item in ("-c", setting)] if neutral else []
        self._neutral = neutral

    @classmethod
    def create(cls, sdist: Path, path: Path) -> Tree:
        """Unpack the sdist into a repository of its own, committed and tagged as the base."""
        tree = cls(unpack(sdist, path))
        tree.git("init", "--quiet")
        tree.git("add", "--all", "--force")
        tree.git("commit", "--quiet", "--message", sdist.name.removesuffix(".tar.gz"))
        tree.git("tag", BASE_TAG)
        return tree

    def git(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run git here. Raises PatchError when it fails, unless told not to check."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        if self._neutral:
            env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        if self._neutral or not _run(["git", "config", "user.email"], cwd=self.path, env=env).stdout.strip():
            names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
            env |= dict.fromkeys(names, "fastdiff")
        done = _run(["git", *self._settings, *arguments], cwd=self.path, env=env)
        if check and done.returncode != 0:
            raise PatchError(f"git {' '.join(arguments[:2])} failed in {self.path}:\n{_tail(done)}")
        return done

    def apply(self, patch: Patch) -> None:
        """Commit a patch on top, exactly: every context line has to match, and whitespace has to be clean.

        Raises:
            PatchError: it does not apply; the tree is as it was before.
        """
        done = self.git("am", "--no-3way", "--whitespace=error", str(patch.path.resolve()), check=False)
        if done.returncode != 0:
            self.git("am", "--abort", check=False)
            raise PatchError(f"{patch.name} does not apply exactly:\n{_tail(done)}")

    def export(self, folder: Path, base: str = BASE_TAG) -> list[str]:
        """Write the commits after `base` to `folder` as patch files; returns their names in order."""
        self.git("format-patch", *_EXPORT, "--output-directory", str(folder.resolve()), f"{base}..HEAD")
        return sorted(file.name for file in folder.glob("*.patch"))


def apply_with_patch(folder: Path, patch: Patch) -> None:
    """Apply with GNU patch and no fuzz. Raises PatchError when a hunk does not match."""
    options = ["-p1", "-F0", "--batch", "--forward", "--no-backup-if-mismatch"]
    done = _run(["patch", *options, "-i", str(patch.path.resolve())], cwd=folder)
    if done.returncode != 0:
        raise PatchError(f"{patch.name} does not apply with patch -F0:\n{_tail(done)}")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a tree but git's own."""
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    named = ((file.relative_to(folder), file) for file in files)
    return {str(name): file.read_bytes() for name, file in named if name.parts[0] != ".git"}


def _move(source: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise PatchError(f"{target} exists and is not empty")
    target.mkdir(exist_ok=True)
    for child in source.iterdir():
        shutil.move(child, target)


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    decoding = {"text": True, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, capture_output=True, **decoding, **options)


def _tail(done: subprocess.CompletedProcess) -> str:
    return "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-12:])
