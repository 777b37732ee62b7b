"""The whole SDXL family: every feature of `family_features.py` in stock and fast, and what pipelines share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_features import BEGIN, END, FEATURES, Family, Feature, markdown

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f"{f.group}: {f.name}")
def test_feature(feature: Feature, assert_close):
    if feature.raises is not None:
        with pytest.raises((TypeError, ValueError), match=feature.raises):
            feature.run(Family("exact"))
        return
    expected = feature.run(Family())
    assert torch.isfinite(expected).all()
    assert_close(feature.run(Family("exact")), expected, feature.tolerance)


def test_readme_shows_the_same_list():
    text = README.read_text()
    if BEGIN not in text:
        pytest.skip("README.md has no feature table yet")
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == markdown(), "run: python tests/family_features.py README.md"
