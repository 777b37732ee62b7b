"""The command line: pictures where they were asked for, and one line for each mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.embedded import load_stock

import fastdiff
from fastdiff import choices
from fastdiff.bench.ladder import LADDER
from fastdiff.bench.names import RUNGS
from fastdiff.cli import main, tune
from fastdiff.cli.compare import describe_ratio
from fastdiff.cli.pictures import psnr
from fastdiff.tuning import layer_key
from fastdiff.weights.int8_units import int8_units
from fastdiff.weights.places import count_weights, form_of, places

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


def test_every_picture_of_a_batch_has_a_seed_that_draws_it_alone(tmp_path, capsys):
    quick = ["--steps", "2", "--size", "64x64", "--preset", "exact"]
    main(["generate", "a star", "-o", str(tmp_path / "x.png"), "--batch", "3", "--seed", "7", *quick])
    out = capsys.readouterr().out
    assert re.findall(r"x-(\d)\.png \(seed (\d+)\)", out) == [("1", "7"), ("2", "8"), ("3", "9")]
    main(["generate", "a star", "-o", str(tmp_path / "alone.png"), "--seed", "9", *quick])
    alone, *others = (Image.open(tmp_path / f"{name}.png") for name in ("alone", "x-3", "x-2"))
    assert psnr(alone, others[0]) > 50 > psnr(alone, others[1])


@pytest.mark.parametrize(
    ("switch", "step"),
    [
        (["--guidance-interval", "0.1,0.8"], "guidance from 10% to 80%"),
        (["--deep-cache-interval", "2"], "in every 2. step"),
        (["--compile", "regional"], "regional"),
    ],
)
def test_switches_reach_the_plan(switch, step, capsys):
    assert main(["explain", "--preset", "exact", *switch]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if step in line]
    assert line.strip().startswith("on")


def test_compare_puts_stock_and_fast_side_by_side(tmp_path, capsys):
    path = tmp_path / "both.png"
    assert main(["generate", "a star", "-o", str(path), "--compare", "--dtype", "float32", *QUICK]) == 0
    picture = Image.open(path)
    half = picture.width // 2
    # Above the labels both halves are enlarged copies of 64x96 pictures.
    stock, fast = (picture.crop((x, 0, x + half, half * 96 // 64)) for x in (0, half))
    assert psnr(fast, stock) > 50
    out = capsys.readouterr().out
    assert "PSNR" in out and "stock / fast =" in out
    assert "too small to gain" in out and "fastdiff demo" in out


def test_compare_has_stock_in_the_same_dtype_and_in_its_own(tmp_path, capsys):
    path = tmp_path / "three.png"
    assert main(["generate", "a star", "-o", str(path), "--compare", "--dtype", "bfloat16", *QUICK]) == 0
    out = capsys.readouterr().out
    for label in ("stock, float32,", "stock, bfloat16,", "fast, bfloat16,"):
        assert label in out
    picture = Image.open(path)
    # 64x96 pictures, enlarged by three, and a line of text under them.
    assert picture.size == (3 * 3 * 64, 3 * 96 + 24)


def test_a_ratio_within_its_spread_is_no_result():
    assert "no difference" in describe_ratio({"median": 1.04, "min": 0.97, "max": 1.2, "all": [0.97, 1.04, 1.2]})
    assert "no difference" in describe_ratio({"median": 1.1, "min": 1.01, "max": 1.2, "all": [1.01, 1.2]})
    assert "no difference" not in describe_ratio({"median": 1.04, "min": 1.01, "max": 1.2, "all": [1.01, 1.04, 1.2]})


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
        (["generate", "x", "--size", "0x64"], "64 or more"),
        (["generate", "x", "--seed", "-1"], "--seed"),
        (["generate", "x", "--seed", str(2**64)], "--seed"),
        (["generate", "x", "--seed", "9" * 5000], "--seed"),
        (["generate", "x", "--guidance", "nan"], "--guidance"),
        (["generate", "x", "--guidance", "-1"], "--guidance"),
        (["generate", "x", "--steps", "1001"], "--steps"),
        (["generate", "x", "--guidance-interval", "0.8,0.1"], "0 <= START < END <= 1"),
        (["generate", "x", "--deep-cache-interval", "1"], "integer of 2 or more"),
        (["generate", "x", "--deep-cache-interval", "2", "--compile", "full"], "compile='full'"),
        (["generate", "x", "--compiled", "nothing"], "does not exist"),
        (["generate", "x", "--model", "no/such/folder"], "cannot be found"),
        (["warmup", "--save", "{tmp}"], "is a directory"),
        (["warmup", "--save", "no/such/file"], "does not exist"),
        (["bench", "--rungs", "exact,first"], "unknown rung 'first'"),
        (["batch", "no-such.jsonl", "--out", "x"], "does not exist"),
        (["serve", "--device", "toaster"], "toaster"),
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


def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, float]:
    """A command in a process of its own, and the processor's seconds that it took."""
    code = "import sys; from fastdiff.cli import main; sys.exit(main())"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **variables}
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done, used


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--preset", "fastest"],
        ["generate", "x", "--device", "toaster"],
        ["explain", "--model", "/no/such/folder"],
        ["bench", "--rungs", "first"],
        ["batch", "no-such.jsonl", "--out", "x"],
        ["serve", "--preset", "fastest"],
    ],
)
def test_what_needs_no_library_is_refused_before_any_is_imported(arguments):
    code = (
        "import sys; from fastdiff.cli import main; code = main(sys.argv[1:])\n"
        "sys.exit(9 if {'torch', 'diffusers', 'ray'} & set(sys.modules) else code)"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 2


def test_pictures_that_no_memory_holds_are_refused_with_the_figure(tmp_path, capsys):
    path = tmp_path / "x.png"
    assert main(["generate", "a star", "-o", str(path), "--size", "65536x65536"]) == 2
    assert re.search(r"--size: a picture of 65536x65536 needs [\d,]+ GiB or more to decode, and cpu has", read(capsys))
    assert main(["generate", "a star", "-o", str(path), "--size", "2048x2048", "--batch", "4000"]) == 2
    assert "4000 pictures" in read(capsys)


def read(capsys) -> str:
    return capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line_and_no_retry(tmp_path):
    # A port of this machine where nothing listens.
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done, used = run("generate", "x", "--model", "stabilityai/stable-diffusion-xl-base-1.0", **nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be reached" in done.stderr and "127.0.0.1:9" in done.stderr
    assert used < 20  # of importing; retries would sleep, which the test below would see


def test_the_hub_is_given_up_after_a_deadline(monkeypatch):
    import huggingface_hub

    from fastdiff.cli import hub

    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: time.sleep(3))
    with pytest.raises(hub.UsageError, match="no answer within 0.1 s"):
        hub.check_model("someone/something")


def test_max_on_a_cpu_says_what_it_takes(monkeypatch, capsys):
    from fastdiff.cli import loading

    arguments = argparse_of("explain", "--preset", "max")
    loading.load_pipeline(arguments)
    assert "takes a minute or more" in read(capsys)
    loading.load_pipeline(argparse_of("explain"))
    assert read(capsys) == ""


def argparse_of(*words: str):
    from fastdiff.cli.main import _parser

    arguments = _parser().parse_args(words)
    arguments.check(arguments)
    return arguments


def test_imports_and_loading_print_nothing():
    code = (
        "import fastdiff\n"
        "from fastdiff import FastConfig, FastStableDiffusionXLPipeline, FastUNet2DConditionModel\n"
        "import logging, warnings\n"
        "assert logging.getLogger('torchao').level == logging.NOTSET\n"
        "assert logging.getLogger('diffusers').level == logging.WARNING\n"
    )
    # Commands that ran in this process have set these for their own.
    own = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_embedded_is_a_name_in_python_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = fastdiff.FastStableDiffusionXLPipeline.from_pretrained("embedded")
    assert pipe.config["_name_or_path"] == fastdiff.EMBEDDED_CHECKPOINT


def test_no_message_advises_to_install_a_foreign_package():
    """The package index has another library under this name."""
    root = Path(fastdiff.__file__).parents[1]
    files = [path for folder in ("fastdiff", "benchmarks", "tests") for path in (root / folder).rglob("*.py")]
    advice = "pip install " + "'fastdiff"
    assert not [path for path in [*files, *root.glob("*.md")] if advice in path.read_text(encoding="utf-8")]


def test_rungs_are_named_as_they_are_built():
    assert tuple(rung.name for rung in LADDER) == RUNGS


needs_int8 = pytest.mark.skipif(int8_units() is None, reason="needs AVX2, VNNI or AMX")
INT8 = pytest.param(["--quantization", "int8-dynamic"], marks=needs_int8)


@pytest.mark.parametrize("arguments", [["--preset", "exact"], ["--dtype", "float16"], INT8])
def test_tuning_measures_the_layers_that_will_run_and_shows_the_forms_that_they_take(
    arguments, tmp_path, capsys, monkeypatch
):
    for name in ("MIN_PARAMETERS", "_MIN_WEIGHTS"):
        monkeypatch.setattr(choices, name, 20_000)  # so that the plan of a small model asks, too
    used, load = [], tune.load_pipeline
    monkeypatch.setattr(tune, "load_pipeline", lambda arguments: used.append(load(arguments)) or used[0])
    assert main(["tune", "--size", "64x64", "--tuning", str(tmp_path / "tuning.json"), *arguments]) == 0
    shown = re.findall(r"^ *\d+ x (.*?): .*; taken: (.*)$", capsys.readouterr().out, re.MULTILINE)
    expected = []
    for model in (used[0].unet, used[0].vae):
        forms: dict[str, set[str]] = {}
        for place in (place for place in places(model).values() if count_weights(place) >= 20_000):
            forms.setdefault(layer_key(place), set()).add(form_of(place))
        expected += [(key, " and ".join(sorted(taken))) for key, taken in forms.items()]
    assert sorted(shown) == sorted(expected)
    assert any("int8" in taken for _, taken in shown) == ("int8-dynamic" in arguments)
