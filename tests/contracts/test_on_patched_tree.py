"""The patched leg of all contracts, on a tree made for it, in a process in which fastdiff is not imported."""

import sys

import diffusers
import pytest
import stock_pictures
from legs import LEG

sys.path.insert(0, str(stock_pictures.CHECKPOINT.parents[2] / "patches"))
from check import CONTRACTS, FOLDER, ROOT  # noqa: E402
from prove import run_script, run_tests  # noqa: E402
from series_file import PatchError, Upstream, lint  # noqa: E402
from upstream_tree import Tree, fetch_sdist  # noqa: E402

PATCHES = lint(FOLDER)

pytestmark = pytest.mark.skipif(LEG.patched, reason="this is the patched leg already")


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A tree with the whole series."""
    try:
        sdist = fetch_sdist(Upstream.read(FOLDER))
    except PatchError as error:
        pytest.skip(f"no patched tree without upstream's sdist: {error}")
    tree = Tree.create(sdist, tmp_path_factory.mktemp("upstream") / "tree")
    for patch in PATCHES:
        tree.apply(patch)
    return tree.path


@pytest.fixture(scope="module")
def outcomes(patched):
    return run_tests(patched, {patch.contract(ROOT) for patch in PATCHES}, CONTRACTS)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.contract(ROOT).stem)
def test_contract_holds(patch, outcomes):
    outcome = outcomes[patch.contract(ROOT).stem]
    assert outcome.passed > 0
    assert (outcome.failed, outcome.skipped) == (0, 0)


@pytest.mark.skipif(
    diffusers.__version__ != Upstream.read(FOLDER).version, reason="the installed diffusers is not the series' base"
)
def test_stock_pipelines_draw_the_same_pictures(patched, tmp_path):
    expected = tmp_path / "expected.bin"
    stock_pictures.main(str(expected))
    after = run_script(patched, CONTRACTS / "stock_pictures.py", tmp_path / "patched.bin")
    assert len(after) > 0
    assert after == expected.read_bytes()
