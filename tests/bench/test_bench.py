"""`fastdiff bench` and what the benchmarks share: the ladder, resuming, errors, table, picture, the GPU script."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from support.tiny import tiny_unet
from torchao.quantization import quantize_

import fastdiff
from fastdiff import FastUNet2DConditionModel
from fastdiff.bench.ladder import LADDER, Rung, rungs_for, weight_bytes
from fastdiff.bench.quantization import layer_errors
from fastdiff.bench.run import OtherRunError, WrongResultError, run_ladder
from fastdiff.bench.sdxl_random import UNET_CONFIG
from fastdiff.bench.settings import REFERENCE, Settings
from fastdiff.bench.stock import load_stock, twin
from fastdiff.bench.table import ratio, seconds, table
from fastdiff.bench.timing import Memory
from fastdiff.bench.workloads import as_array, step_flops, step_inputs, workload
from fastdiff.cli import main
from fastdiff.weights.int8_units import int8_units
from fastdiff.weights.torchao_form import torchao_config

ROOT = Path(__file__).resolve().parents[2]
STEP = Settings(
    model=fastdiff.EMBEDDED_CHECKPOINT, size=(64, 64), measures=("step",), dtype=torch.float32, rounds=2, steps=2
)
needs_int8 = pytest.mark.skipif(int8_units() is None, reason="needs AVX2, VNNI or AMX")
EAGER = ["channels-last", "exact", "balanced"]


@pytest.fixture(scope="module")
def base():
    return load_stock(STEP)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory) -> tuple[dict, Path]:
    """Results of the rungs that compile nothing, and the file that holds them."""
    path = tmp_path_factory.mktemp("bench") / "ladder.json"
    return run_ladder(STEP, rungs_for(STEP, EAGER), path, "embedded", bar=False), path


def climb_none(base, settings):
    raise AssertionError("this rung was done before")


def test_the_ladder_names_each_rung_once_and_in_order():
    names = [rung.name for rung in LADDER]
    assert len(set(names)) == len(names)
    assert names[:8] == ["float32", "bfloat16", "sdpa", "channels-last", "recipe", "exact", "balanced", "max"]
    assert {rung.kind for rung in LADDER[8:]} == {"peer"}


def test_the_reference_is_always_climbed():
    assert [rung.name for rung in rungs_for(STEP, ["exact"])] == [REFERENCE, "exact"]
    with pytest.raises(ValueError, match="unknown rung 'fast'; choose from float32"):
        rungs_for(STEP, ["fast"])


def test_no_rung_comes_twice_in_float32():
    assert "bfloat16" not in [rung.name for rung in rungs_for(STEP)]
    assert "bfloat16" in [rung.name for rung in rungs_for(dataclasses.replace(STEP, dtype=torch.bfloat16))]


@pytest.mark.parametrize("change", [{"float32": True}, {"channels_last": True}, {"sdpa": False}])
def test_a_twin_leaves_the_shared_weights_alone(change):
    settings = dataclasses.replace(STEP, dtype=torch.bfloat16)
    base = load_stock(settings)
    before = {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in base.unet.named_parameters()}
    processors = {type(p) for p in base.unet.attn_processors.values()}
    changed = twin(base, **change)
    run = workload("step", changed, settings)
    error = as_array(run()) - as_array(workload("step", base, settings)())
    assert abs(error).max() < 0.1
    assert {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in base.unet.named_parameters()} == before
    assert {type(p) for p in base.unet.attn_processors.values()} == processors
    kernel = changed.unet.conv_in.weight
    assert changed.unet.dtype == (torch.float32 if "float32" in change else torch.bfloat16)
    assert kernel.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in change)
    assert ({type(p) for p in changed.unet.attn_processors.values()} == processors) == ("sdpa" not in change)
    if "float32" in change:
        assert {model.dtype for model in (changed.vae, changed.text_encoder, changed.text_encoder_2)} == {torch.float32}
    else:
        assert weight_bytes(changed) == weight_bytes(base)


def test_a_fast_rung_leaves_the_shared_weights_alone(base):
    before = {name: (p.data_ptr(), p.storage_offset()) for name, p in base.unet.named_parameters()}
    (exact,) = rungs_for(STEP, ["exact"])[1:]
    assert any(step.name == "fuse_qkv" and step.applied for step in exact.build(base, STEP).plan)
    assert {name: (p.data_ptr(), p.storage_offset()) for name, p in base.unet.named_parameters()} == before


def test_every_rung_is_timed_against_stock(climbed):
    results, path = climbed
    assert json.loads(path.read_text()) == results
    assert list(results["rungs"]) == [REFERENCE, *EAGER]
    for rung in results["rungs"].values():
        times, ratios = rung["times"]["step"], rung["ratios"]["step"][REFERENCE]
        assert len(times["all"]) == len(ratios["all"]) == STEP.rounds
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert 0 < ratios["min"] <= ratios["median"] <= ratios["max"]
        assert rung["errors"]["step"] < 1e-4
        assert rung["memory"]["weights"] > 0
    assert results["settings"]["model"] == "embedded"
    assert results["machine"]["versions"]["torch"] == importlib.metadata.version("torch")


def test_a_preset_that_does_the_same_is_not_run_twice(climbed):
    results, _ = climbed
    exact, balanced = results["rungs"]["exact"], results["rungs"]["balanced"]
    assert balanced["same_as"] == "exact" and balanced["times"] == exact["times"]
    assert balanced["label"] != exact["label"]
    assert "applies the same here as" in table(results)


def test_a_run_goes_on_where_it_ended(climbed, tmp_path):
    results, path = climbed
    copy = tmp_path / "ladder.json"
    held = json.loads(path.read_text())
    del held["rungs"]["exact"], held["rungs"]["balanced"]
    copy.write_text(json.dumps(held))
    done = [dataclasses.replace(rung, build=climb_none) for rung in rungs_for(STEP, ["channels-last"])]
    again = run_ladder(STEP, [*done, *rungs_for(STEP, ["exact"])[1:]], copy, "embedded", bar=False)
    assert again["rungs"]["channels-last"] == results["rungs"]["channels-last"]
    assert list(again["rungs"]) == [REFERENCE, "channels-last", "exact"]


@pytest.mark.parametrize("change", [{"size": (72, 64)}, {"rounds": 3}, {"dtype": torch.bfloat16}])
def test_a_file_of_another_run_is_not_added_to(climbed, change):
    _, path = climbed
    before = path.read_bytes()
    with pytest.raises(OtherRunError, match="other settings"):
        run_ladder(dataclasses.replace(STEP, **change), rungs_for(STEP, EAGER), path, "embedded", bar=False)
    assert path.read_bytes() == before


def test_a_rung_that_fails_ends_the_run_and_keeps_the_others(tmp_path, capsys):
    def broken(base, settings):
        raise FloatingPointError("no such kernel")

    path = tmp_path / "ladder.json"
    rungs = [*rungs_for(STEP, [REFERENCE]), Rung("exact", "broken", broken)]
    with pytest.raises(FloatingPointError, match="no such kernel"):
        run_ladder(STEP, rungs, path, bar=False)
    assert list(json.loads(path.read_text())["rungs"]) == [REFERENCE]
    assert "exact failed" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [2.0, math.nan])
def test_a_rung_with_another_result_ends_the_run(factor):
    def wrong(base, settings):
        pipe = twin(base, channels_last=True)
        pipe.unet.conv_out.register_forward_hook(lambda module, args, output: output * factor)
        return pipe

    with pytest.raises(WrongResultError, match="wrong: step differs from stock's"):
        run_ladder(STEP, [Rung("wrong", "wrong", wrong)], bar=False)


def test_a_peer_that_is_not_installed_is_listed(tmp_path):
    absent = Rung("openvino", "OpenVINO", climb_none, "peer", lambda settings: "not installed: pip install it")
    results = run_ladder(STEP, [*rungs_for(STEP, [REFERENCE]), absent], bar=False)
    assert results["rungs"]["openvino"] == {
        "label": "OpenVINO", "kind": "peer", "missing": "not installed: pip install it"
    }
    assert "OpenVINO: not installed: pip install it" in table(results)


def test_rounds_end_when_time_is_up():
    settings = dataclasses.replace(STEP, rounds=1000, seconds=0.0)
    results = run_ladder(settings, rungs_for(settings, [REFERENCE]), bar=False)
    assert len(results["rungs"][REFERENCE]["times"]["step"]["all"]) == 2


def test_flops_of_the_full_size_unet():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIG)
    settings = Settings(model="sdxl-random", size=(1024, 1024), measures=("step",))
    assert step_flops(unet, settings) == pytest.approx(2 * 6.761e12, rel=1e-3)


def test_whole_pictures_and_decodes_are_compared_too(base):
    settings = dataclasses.replace(STEP, measures=("picture", "vae"), batch=2)
    results = run_ladder(settings, rungs_for(settings, ["exact"]), bar=False)
    exact = results["rungs"]["exact"]
    assert set(exact["times"]) == {"picture", "vae"}
    assert exact["errors"]["picture"] < 0.05 and exact["errors"]["vae"] < 1e-4
    pictures = workload("picture", base, settings)()
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert as_array(pictures).shape == (2, 64, 64, 3)


def test_memory_of_a_call_is_seen():
    memory = Memory("cpu")
    if memory.current() is None:
        pytest.skip("this system does not tell a process's memory")
    memory.reset_peak()
    before = memory.current()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert memory.peak() - before > 48 * 2**20


def test_numbers_are_readable():
    assert [seconds(x) for x in (0.00123, 0.456, 0.9999, 1.2, 83.21)] == ["1.23 ms", "456 ms", "1 s", "1.2 s", "83.2 s"]
    assert ratio({"median": 1.234, "min": 1.1, "max": 1.3}) == "1.23 (1.10-1.30)"
    assert ratio(None) == "-"


def test_command_prints_the_table_and_draws(tmp_path, capsys):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = ["bench", "--size", "64x64", "--steps", "2", "--rounds", "2", "--rungs", "channels-last,exact"]
    command += ["--dtype", "float32", "--device", "cpu", "--json", str(path), "--plot", str(picture)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "picture: embedded, 64x64, batch 1 with guidance, 2 steps, float32" in out
    assert 'fastdiff "exact"' in out and "+ channels_last" in out
    assert 'No result beside stock' in out and '+ channels_last; fastdiff "exact"' in out
    assert fastdiff.EMBEDDED_CHECKPOINT not in path.read_text()
    with Image.open(picture) as drawn:
        assert drawn.width == 1500 and len(set(drawn.convert("L").getdata())) > 50
    # All is done: the table comes at once, from the file.
    before = path.read_bytes()
    assert main(command[:-2]) == 0
    assert path.read_bytes() == before
    assert out.startswith(capsys.readouterr().out.partition("wrote")[0])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rungs", "quick"], "unknown rung 'quick'"),
        (["--json", "out.txt"], "must end in one of .json"),
        (["--plot", "nowhere/out.png"], "the folder 'nowhere' does not exist"),
        (["--plot", "out.bmp"], "must end in one of .png, .svg, .pdf"),
        (["--size", "65x64"], "multiples of 8"),
        (["--rounds", "0"], "not a whole number from 1"),
        (["--model", "nowhere/at-all/x"], "nowhere/at-all/x"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_arguments_get_one_line(arguments, complaint, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_plot_without_matplotlib_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # Python's own mark of a module that cannot be imported
    assert main(["bench", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err


def test_weights_of_a_quantized_model_are_counted():
    model = torch.nn.Linear(1024, 1024, bias=False).bfloat16()
    pipe = SimpleNamespace(components={"unet": model})
    plain = weight_bytes(pipe)
    quantize_(model, torchao_config("int8-weight-only"))
    assert plain / 2 < weight_bytes(pipe) < 0.6 * plain


@pytest.mark.parametrize("scheme", ["int8-weight-only", pytest.param("int8-dynamic", marks=needs_int8)])
def test_errors_of_quantized_layers_are_found_on_their_own_inputs_worst_first(scheme):
    unet = FastUNet2DConditionModel.from_stock(tiny_unet())
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    errors = layer_errors(unet, step_inputs(unet, STEP), scheme, min_weights=1)
    found = [error["quantized"] for error in errors.values()]
    assert found and found == sorted(found, reverse=True) and 1e-4 < found[-1] and found[0] < 0.1
    assert all(error["plain"] < 1e-5 for error in errors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
