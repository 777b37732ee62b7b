"""`patches/check.py`: what it accepts, what it refuses, and that each patch applies to the bare release."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "patches"))
from check import CONTRACTS, FOLDER, PatchError, Tree, fetch_sdist, read_series, require, run_tests  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """A copy of `patches/`."""
    return Path(shutil.copytree(FOLDER, tmp_path / "patches"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    try:
        fetch_sdist()
    except PatchError as error:
        pytest.skip(f"no upstream tree without the sdist: {error}")
    return Tree(tmp_path_factory.mktemp("upstream") / "tree")


def test_each_patch_has_a_contract_and_a_text_for_its_pull_request():
    for patch in read_series():
        text = (FOLDER / f"{patch.path.name[:4]}.md").read_text(encoding="utf-8")
        assert text.startswith("# ")
        for section in ("## Problem", "## What changes", "## How measured", "## Related"):
            assert f"\n{section}\n" in text, (patch.path.name, section)


def test_no_patch_carries_trailers_of_ours():
    for patch in read_series():
        message = patch.path.read_text(encoding="utf-8").partition("\ndiff --git ")[0]
        assert not any(
            word in message for word in ("Contract:", "Fastdiff", "fastdiff", "Remove-when:", "Upstream-Status:")
        )


@pytest.mark.parametrize("change", ["no patch", "no text", "unlisted"])
def test_a_series_that_disagrees_with_the_folder_is_refused(folder, change):
    if change == "unlisted":
        (folder / "0099-More.patch").touch()
    else:
        min(folder.glob("0*.patch" if change == "no patch" else "0*.md")).unlink()
    with pytest.raises(PatchError, match=r"0099-More\.patch" if change == "unlisted" else "0002"):
        read_series(folder)


def test_every_patch_applies_to_the_bare_release_and_git_merges_them(tree):
    patches = [patch for patch in read_series() if patch.in_sdist]
    tree.apply_all(patches)
    subjects = tree.git("log", "--format=%s", "base..HEAD").stdout.splitlines()
    assert len(subjects) == len(patches)


def test_a_hunk_that_needs_fuzz_is_refused(tree, folder):
    patch = read_series(folder)[6]
    text = patch.path.read_text(encoding="utf-8")
    patch.path.write_text(text.replace("\n     _supports_gradient", "\n     _supported_gradient", 1), encoding="utf-8")
    with pytest.raises(PatchError, match="git am"):
        tree.apply(patch)
    tree.git("am", "--abort", check=False)


def test_outcomes_are_told_apart(tmp_path):
    test = tmp_path / "test_toy.py"
    test.write_text(
        "import pytest\n\n"
        "def test_good(): pass\n\n"
        "def test_bad(): assert False\n\n"
        "def test_none(): pytest.skip()\n\n"
        "def test_broken(gone): pass\n"
    )
    outcomes = run_tests(tmp_path, [test], tmp_path)
    assert [outcomes[f"test_toy.test_{name}"] for name in ("good", "bad", "none", "broken")] == [
        "passed",
        "failed",
        "skipped",
        "failed",
    ]
    for wanted in ("passed", "failed"):
        with pytest.raises(PatchError, match="test_toy.test_none skipped"):
            require(outcomes, wanted, "with a toy")
    assert require({"a": "failed"}, "failed", "without a toy") == 1
    with pytest.raises(PatchError, match="there is none"):
        require({}, "passed", "with a toy")


def test_tests_that_cannot_run_are_no_failures(tmp_path):
    (tmp_path / "test_toy.py").write_text("import no_such_module\n")
    with pytest.raises(PatchError, match="no_such_module"):
        run_tests(tmp_path, [tmp_path / "test_toy.py"], tmp_path)


def test_contracts_exist():
    assert {patch.contract.parent for patch in read_series()} == {CONTRACTS}
