"""The patched leg of the quick contracts, on a tree made for it, in a process in which fastdiff is not imported.

`python patches/check.py` runs all of them, before and after each patch.
"""

import sys
from pathlib import Path

import diffusers
import pytest
from legs import LEG

sys.path.insert(0, str(Path(__file__).parents[2] / "patches"))
from check import CONTRACTS, PatchError, Tree, fetch_sdist, pictures, read_series, require, run_tests  # noqa: E402

QUICK = ["test_fuse_repeats.py", "test_attention_backend_is_reported.py", "test_eight_bits_on_device.py"]
QUICK += ["test_sigmas_stay_on_host.py", "test_add_noise_copies_nothing.py", "test_unipc_never_waits.py"]

pytestmark = pytest.mark.skipif(LEG.patched, reason="this is the patched leg already")


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A tree with the whole series."""
    try:
        version = fetch_sdist().name.removesuffix(".tar.gz").rpartition("-")[2]
    except PatchError as error:
        pytest.skip(f"no patched tree without upstream's sdist: {error}")
    tree = Tree(tmp_path_factory.mktemp("upstream") / "tree")
    tree.apply_all([patch for patch in read_series() if patch.in_sdist])
    tree.version = version
    return tree


def test_quick_contracts_hold(patched):
    require(run_tests(patched.path, [CONTRACTS / name for name in QUICK]), "passed", "with the whole series")


def test_stock_pipelines_draw_the_same_pictures(patched):
    if diffusers.__version__ != patched.version:
        pytest.skip("the installed diffusers is not the base of the series")
    before = pictures(Path(diffusers.__file__).parents[2])
    assert len(before) > 0
    assert pictures(patched.path) == before
