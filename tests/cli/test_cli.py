"""The command line: pictures where they were asked for, and one line for each mistake."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.embedded import load_stock

from fastdiff.cli import main
from fastdiff.cli.pictures import psnr

QUICK = ["--steps", "2", "--size", "64x96", "--seed", "3"]


def test_generate_writes_the_picture(tmp_path, capsys):
    path = tmp_path / "circle.png"
    assert main(["generate", "a red circle on a blue background", "-o", str(path), *QUICK]) == 0
    assert Image.open(path).size == (64, 96)
    out = capsys.readouterr().out
    assert str(path) in out and "seed 3" in out and " s" in out
    assert [p.name for p in tmp_path.iterdir()] == ["circle.png"]


def test_the_seed_decides_the_picture(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, seed in zip(paths, ("1", "1", "2"), strict=True):
        main(["generate", "a star", "-o", str(path), "--steps", "2", "--size", "64x64", "--seed", seed])
    a, b, c = (np.asarray(Image.open(path)) for path in paths)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_batch_numbers_the_pictures(tmp_path):
    assert main(["generate", "a star", "-o", str(tmp_path / "x.png"), "--batch", "2", *QUICK]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]


def test_compare_puts_stock_and_fast_side_by_side(tmp_path, capsys):
    path = tmp_path / "both.png"
    assert main(["generate", "a star", "-o", str(path), "--compare", "--preset", "exact", *QUICK]) == 0
    picture = Image.open(path)
    half = picture.width // 2
    # Above the labels both halves are enlarged copies of 64x96 pictures.
    stock, fast = (picture.crop((x, 0, x + half, half * 96 // 64)) for x in (0, half))
    assert psnr(fast, stock) > 50
    out = capsys.readouterr().out
    assert "PSNR" in out and "stock / fast =" in out


def test_psnr():
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert psnr(black, black) == float("inf") and psnr(black, white) == 0


def test_explain_names_every_step(capsys):
    assert main(["explain", "--preset", "exact"]) == 0
    out = capsys.readouterr().out
    for name in ("fuse_qkv", "context_cache", "quantize", "compile"):
        assert name in out


def test_a_prompt_outside_of_the_vocabulary_gets_a_hint(tmp_path, capsys):
    assert main(["generate", "an astronaut in a jungle", "-o", str(tmp_path / "a.png"), *QUICK]) == 0
    assert "embedded model" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickled")
    load_stock().save_pretrained(folder, safe_serialization=False)
    return folder


@pytest.fixture(scope="module")
def version_1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--preset", "fastest"], "Unknown preset 'fastest'"),
        (["generate", ""], "prompt is empty"),
        (["generate", "  \n "], "prompt is empty"),
        (["generate", "x", "--size", "big"], "write WIDTHxHEIGHT"),
        (["generate", "x", "--size", "100x64"], "multiples of 8"),
        (["generate", "x", "--size", "0x64"], "multiples of 8"),
        (["generate", "x", "--steps", "0"], "--steps"),
        (["generate", "x", "--batch", "-1"], "--batch"),
        (["generate", "x", "-o", "out.gif"], "must end in"),
        (["generate", "x", "-o", "no/such/folder/out.png"], "does not exist"),
        (["generate", "x", "--model", "{tmp}"], "without model_index.json"),
        (["generate", "x", "--model", "{version_1}"], "StableDiffusionPipeline checkpoint"),
        (["generate", "x", "--model", "{pickled}"], "holds no safetensors"),
        (["generate", "x", "--device", "toaster"], "toaster"),
        (["explain", "--preset", "fastest"], "Unknown preset"),
        (["paint"], "invalid choice"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, tmp_path, version_1, pickled, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"tmp": tmp_path, "version_1": version_1, "pickled": pickled}
    assert main([argument.format(**folders) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and words in captured.err
    assert not list(tmp_path.glob("**/*.png"))
