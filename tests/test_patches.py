"""`patches/apply.py` on a toy upstream: what it accepts, what it refuses and with which words."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[1] / "patches"

SOURCE = {
    "pyproject.toml": '[project]\nname = "toy"\n',
    "src/toy/__init__.py": '__version__ = "1.0"\n',
    "src/toy/numbers.py": "import math\n\n\ndef answer():\n    return 41\n\n\ndef circle():\n    return math.tau\n",
    "src/toy/copy.py": "# Copied from toy.numbers.answer with answer->reply\ndef reply():\n    return 41\n",
}
FIXED = {
    "src/toy/numbers.py": SOURCE["src/toy/numbers.py"].replace("41", "42"),
    "src/toy/copy.py": SOURCE["src/toy/copy.py"].replace("41", "42"),
    "tests/test_answer.py": "from toy.numbers import answer\n\n\ndef test_answer():\n    assert answer() == 42\n",
}
DIAMETER = {
    "src/toy/numbers.py": FIXED["src/toy/numbers.py"].replace("math.tau", "math.pi"),
    "tests/test_circle.py": "from toy.numbers import circle\n\n\ndef test_circle():\n    assert circle() < 4\n",
}
MESSAGE = """{subject}

Because it is right.

How to observe it: look.

Measured effect: one more.

Upstream-Status: Pending
Base: toy 1.0
Contract: tests/contracts/test_{contract}.py
Fastdiff-Room: fastdiff
Remove-when: upstream has it
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def commit(folder: Path, files: dict[str, str], message: str) -> None:
    write(folder, files)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


@dataclass
class Project:
    """A copy of `patches/` with a toy series, beside its contracts."""

    root: Path
    sdist: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    def first(self) -> Path:
        return min(self.patches.glob("*.patch"))

    def edit_first(self, old: str, new: str) -> None:
        text = self.first().read_text(encoding="utf-8")
        assert old in text
        self.first().write_text(text.replace(old, new, 1), encoding="utf-8")

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `apply.py`; its exit status, and all it printed."""
        command = [sys.executable, self.patches / "apply.py", *arguments]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        assert not done.stderr.startswith("Traceback"), done.stderr
        return done.returncode, done.stdout + done.stderr

    def check(self, *options: str) -> tuple[int, str]:
        return self.run("check", "--sdist", str(self.sdist), *options)

    def quick_error(self) -> str:
        """What `check` without the contracts says, which has to be an error."""
        status, said = self.check("--no-contracts")
        assert status == 1, said
        return said[said.index("error: ") :]


def make_project(folder: Path) -> Project:
    sdist = folder / "toy-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in SOURCE.items():
            entry = tarfile.TarInfo(f"toy-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    root = folder / "project"
    write(
        root,
        {
            "fastdiff/__init__.py": "",
            "tests/contracts/test_forty_two.py": FIXED["tests/test_answer.py"],
            "tests/contracts/test_round.py": DIAMETER["tests/test_circle.py"],
            "patches/UPSTREAM": "project: toy\nversion: 1.0\n"
            f"sha256: {hashlib.sha256(sdist.read_bytes()).hexdigest()}\n",
            "patches/series": "",
        },
    )
    for file in PATCHES.glob("*.py"):
        shutil.copy(file, root / "patches")
    project = Project(root, sdist)
    tree = checkout(folder / "tree")
    commit(tree, FIXED, MESSAGE.format(subject="Fix the answer", contract="forty_two"))
    commit(tree, DIAMETER, MESSAGE.format(subject="Halve the circle", contract="round"))
    status, said = project.run("refresh", "--from", str(tree), "--base", "HEAD~2")
    assert status == 0, said
    return project


def checkout(folder: Path) -> Path:
    """A checkout of the toy release, as a user has one."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    commit(folder, SOURCE, "toy 1.0")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("made"))


@pytest.fixture
def project(made, tmp_path) -> Project:
    shutil.copytree(made.root, tmp_path / "project")
    return Project(tmp_path / "project", made.sdist)


def test_the_real_series_is_well_formed():
    series = subprocess.run(
        [sys.executable, "-c", "from series_file import *; print(len(lint(Path.cwd())))"],
        cwd=PATCHES,
        capture_output=True,
        text=True,
    )
    assert (series.returncode, series.stderr) == (0, "")
    assert int(series.stdout) >= 6


# check


def test_check_proves_the_series(project):
    status, said = project.check()
    assert status == 0, said
    for line in (
        "lint: 2 patches on toy 1.0",
        "export: equals the committed files",
        "contract: test_forty_two.py fails without 0001-Fix-the-answer.patch (1 tests)",
        "contract: test_forty_two.py passes with 0001-Fix-the-answer.patch (1 tests)",
        "contract: test_round.py fails without 0002-Halve-the-circle.patch (1 tests)",
        "contract: test_round.py passes with 0002-Halve-the-circle.patch (1 tests)",
        "series: 2 contracts and 2 upstream test files pass on the whole of it",
        "all good",
    ):
        assert line in said.splitlines()


def test_check_refuses_a_missing_patch(project):
    project.first().unlink()
    assert "series lists 0001-Fix-the-answer.patch, which is missing from patches/" in project.quick_error()


def test_check_refuses_an_unlisted_patch(project):
    (project.patches / "0003-More.patch").write_text("")
    assert "0003-More.patch is in patches/ but series does not list it" in project.quick_error()


def test_check_refuses_a_wrong_hash(project):
    upstream = project.patches / "UPSTREAM"
    upstream.write_text(upstream.read_text()[:-65] + "0" * 64 + "\n")
    error = project.quick_error()
    assert "toy-1.0.tar.gz has the sha256" in error
    assert "but UPSTREAM names 000000" in error


def test_check_refuses_a_hunk_that_needs_fuzz(project):
    project.edit_first("\n def circle():\n", "\n def circles():\n")
    error = project.quick_error()
    assert "0001-Fix-the-answer.patch does not apply exactly" in error
    assert "src/toy/numbers.py" in error


def test_check_refuses_a_hunk_at_another_line(project):
    project.edit_first("@@ -2,7 +2,7 @@", "@@ -3,7 +3,7 @@")
    assert "is not what git exports" in project.quick_error()


def test_check_refuses_a_contract_that_passes_without_the_patch(project):
    write(project.root, {"tests/contracts/test_forty_two.py": "def test_nothing():\n    pass\n"})
    status, said = project.check()
    assert status == 1
    assert "0001-Fix-the-answer.patch: test_forty_two.py passes without the patch" in said


def test_check_refuses_a_contract_that_fails_with_the_patch(project):
    write(project.root, {"tests/contracts/test_forty_two.py": "def test_nothing():\n    assert False\n"})
    status, said = project.check()
    assert status == 1
    assert "0001-Fix-the-answer.patch: test_forty_two.py must pass with the patch" in said


def test_check_refuses_a_contract_that_cannot_run(project):
    write(project.root, {"tests/contracts/test_forty_two.py": "import no_such_module\n"})
    status, said = project.check()
    assert status == 1
    assert "error: the tests could not run" in said
    assert "no_such_module" in said


def test_check_refuses_a_copy_that_is_no_longer_one(project, tmp_path):
    tree = checkout(tmp_path / "tree")
    files = {name: text for name, text in FIXED.items() if "copy" not in name}
    commit(tree, files, MESSAGE.format(subject="Fix the answer", contract="forty_two"))
    assert project.run("refresh", "--from", str(tree), "--base", "HEAD~1")[0] == 0
    error = project.quick_error()
    assert "copies that no longer equal their original" in error
    assert "copy.py: # Copied from toy.numbers.answer" in error


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("How to observe it: look.", "Look.", "the message has no section 'How to observe it:'"),
        ("Remove-when: upstream has it\n", "", "the message has no trailer 'Remove-when:'"),
        ("Status: Pending", "Status: Soon", "Upstream-Status must begin with one of Pending, Submitted"),
        ("Status: Pending", "Status: Submitted", "Submitted needs the pull request"),
        ("Base: toy 1.0", "Base: toy 0.9", "Base is 'toy 0.9', but UPSTREAM is toy 1.0"),
        ("test_forty_two.py", "test_gone.py", "Contract: tests/contracts/test_gone.py does not exist"),
        ("Room: fastdiff", "Room: fastdiff/gone.py", "Fastdiff-Room: fastdiff/gone.py does not exist"),
        ("right.", "right. TODO", "the message still has a TODO"),
        ("Subject: [PATCH]", "Subject:", "not made by git format-patch"),
        ("b/src/toy/numbers.py", "b/setup.py", "changes setup.py, outside of src/ and tests/"),
        ("+def test_answer", "+#\n" * 150 + "+def test_answer", "split it at 150"),
    ],
)
def test_check_refuses_a_bad_patch_and_names_it(project, old, new, problem):
    project.edit_first(old, new)
    error = project.quick_error()
    assert "0001-Fix-the-answer.patch" in error
    assert problem in error


# apply


def test_apply_commits_the_series(project, tmp_path):
    tree = checkout(tmp_path / "mine")
    status, said = project.run("apply", "--to", str(tree))
    assert status == 0, said
    subjects = git(tree, "log", "--format=%s").splitlines()
    assert subjects == ["Halve the circle", "Fix the answer", "toy 1.0"]
    assert (tree / "src/toy/numbers.py").read_text() == DIAMETER["src/toy/numbers.py"]
    assert git(tree, "status", "--porcelain") == ""


@pytest.mark.parametrize("name", ["src/toy/numbers.py", "notes.txt"])
def test_apply_refuses_a_dirty_tree(project, tmp_path, name):
    tree = checkout(tmp_path / "mine")
    write(tree, {name: "mine\n"})
    status, said = project.run("apply", "--to", str(tree))
    assert status == 1
    assert "has changes that are not committed" in said
    assert (tree / name).read_text() == "mine\n"
    assert git(tree, "log", "--format=%s").splitlines() == ["toy 1.0"]


def test_apply_leaves_nothing_half_applied(project, tmp_path):
    tree = checkout(tmp_path / "mine")
    clash = SOURCE["src/toy/numbers.py"].replace("math.tau", "2 * math.pi")
    commit(tree, {"src/toy/numbers.py": clash}, "Mine")
    before = git(tree, "rev-parse", "HEAD")
    status, said = project.run("apply", "--to", str(tree))
    assert status == 1
    assert "0002-Halve-the-circle.patch does not apply exactly" in said
    assert git(tree, "rev-parse", "HEAD") == before
    assert git(tree, "status", "--porcelain") == ""
    assert not (tree / ".git" / "rebase-apply").exists()


def test_apply_refuses_another_release(project, tmp_path):
    tree = checkout(tmp_path / "mine")
    commit(tree, {"src/toy/__init__.py": '__version__ = "1.1"\n'}, "toy 1.1")
    status, said = project.run("apply", "--to", str(tree))
    assert (status, "is not at 1.0; check out the release first" in said) == (1, True)


def test_apply_refuses_what_is_no_checkout(project, tmp_path):
    write(tmp_path / "plain", SOURCE)
    for folder in (tmp_path / "plain", tmp_path / "nowhere", checkout(tmp_path / "mine") / "src"):
        status, said = project.run("apply", "--to", str(folder))
        assert (status, "is not the top of a git checkout" in said) == (1, True)


# refresh and new


def test_refresh_changes_nothing_that_is_right(project):
    before = {file.name: file.read_bytes() for file in project.patches.iterdir() if file.is_file()}
    status, said = project.run("refresh", "--sdist", str(project.sdist))
    assert status == 0, said
    assert said.count("unchanged") == 2
    assert {file.name: file.read_bytes() for file in project.patches.iterdir() if file.is_file()} == before


def test_refresh_writes_moved_hunks_anew(project):
    right = project.first().read_bytes()
    project.edit_first("@@ -2,7 +2,7 @@", "@@ -3,7 +3,7 @@")
    assert project.run("refresh", "--sdist", str(project.sdist))[0] == 0
    assert project.first().read_bytes() == right


def test_new_prepares_a_patch_and_refresh_takes_it(project, tmp_path):
    tree = tmp_path / "new"
    status, said = project.run("new", "shiny", "--to", str(tree), "--sdist", str(project.sdist))
    assert status == 0, said
    assert "pytest.fail" in (project.root / "tests/contracts/test_shiny.py").read_text()
    status, said = project.run("refresh", "--from", str(tree))
    assert (status, "not made by git format-patch" in said) == (1, True)  # the commit is still empty
    assert len(list(project.patches.glob("*.patch"))) == 2

    write(
        tree, {"src/toy/shiny.py": "SHINY = True\n", "tests/test_shiny.py": "def test_shiny():\n    import toy.shiny\n"}
    )
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--amend", "--no-edit")
    status, said = project.run("refresh", "--from", str(tree))
    assert (status, "the message still has a TODO" in said) == (1, True)

    git(tree, "commit", "--quiet", "--amend", "-m", MESSAGE.format(subject="Shine", contract="shiny"))
    status, said = project.run("refresh", "--from", str(tree))
    assert status == 0, said
    assert "0003-Shine.patch" in (project.patches / "series").read_text().splitlines()


def test_new_refuses_a_name_that_is_no_name(project):
    status, said = project.run("new", "no-name", "--sdist", str(project.sdist))
    assert (status, "NAME must be like a Python name" in said) == (1, True)
