"""The demo's picture: what was drawn, and bars for what was timed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.cli.demo import PROMPTS, _full_size_step
from fastdiff.cli.poster import poster

MACHINE = {"cpu": "some processor", "threads": 2, "versions": {"torch": "1", "diffusers": "2", "torchao": "3"}}
SETTINGS = {"model": "sdxl-random", "size": [256, 256], "batch": 1, "measures": ["step"], "dtype": "bfloat16"}
STOCK, FASTDIFF = (169, 177, 189), (47, 125, 225)


def drawn(ratios: list[float]) -> Image.Image:
    pictures = [Image.new("RGB", (128, 128), "red") for _ in PROMPTS]
    ratio = {"median": sorted(ratios)[len(ratios) // 2], "min": min(ratios), "max": max(ratios), "all": ratios}
    results = {"machine": MACHINE, "settings": SETTINGS, "ratio": ratio}
    results |= {"stock": {"median": 2.0}, "fast": {"median": 2.0 / ratio["median"]}}
    return poster(PROMPTS, pictures, pictures, 50.0, results)


def widest(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """The longest row of a colour, in pixels: the length of its bar."""
    return (np.asarray(picture) == colour).all(axis=2).sum(axis=1).max()


def test_bars_are_as_long_as_the_times():
    picture = drawn([1.9, 2.0, 2.1])
    assert abs(widest(picture, STOCK) / widest(picture, FASTDIFF) - 2) < 0.05


def test_without_times_there_are_pictures_alone():
    pictures = [Image.new("RGB", (128, 128), "red") for _ in PROMPTS]
    plain = poster(PROMPTS, pictures, pictures, 50.0, None)
    assert widest(plain, (255, 0, 0)) >= len(PROMPTS) * 176
    assert plain.height < drawn([1.9, 2.0, 2.1]).height


def test_no_gain_is_claimed_from_a_ratio_that_spreads_over_one():
    clear, unclear = (np.asarray(drawn(ratios)) for ratios in ([1.1, 1.2, 1.3], [0.9, 1.2, 1.3]))
    assert not np.array_equal(clear, unclear)


class Timed(Exception):
    """The step would be timed."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_size_is_left_out_where_the_dtype_of_this_machine_does_not_fit(dtype, monkeypatch, capsys):
    def run_ladder(settings, rungs):
        assert settings.dtype == dtype
        raise Timed

    monkeypatch.setattr("fastdiff.pipelines.checkpoints.loading_dtype", lambda config: dtype)
    monkeypatch.setattr("fastdiff.bench.timing.free_memory", lambda device: 14 * 2**30)
    monkeypatch.setattr("fastdiff.bench.run.run_ladder", run_ladder)
    if dtype == torch.bfloat16:
        with pytest.raises(Timed):
            _full_size_step(torch.device("cpu"))
    else:
        assert _full_size_step(torch.device("cpu")) is None
        assert "needs 21 GiB of memory in float32, and 14.0 GiB are free" in capsys.readouterr().out
