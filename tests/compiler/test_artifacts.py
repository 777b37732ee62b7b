"""Compiled code in a file: used where it fits, refused with the reason where not, never read when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.embedded import draw, load_fast, load_stock
from support.loras import write_lora
from torch._dynamo.utils import counters

from fastdiff import FastConfig
from fastdiff.cli import main
from fastdiff.compiler.artifacts import FORMAT, read_artifacts

COMPILED = FastConfig.preset("exact", compile="regional")

# A process of its own for each: warm up, save and draw, or load and draw. One class of block is enough, and compiles in
# seconds.
PROCESS = """
import json, sys, warnings
from support.embedded import draw, load_fast
from test_artifacts import COMPILED, fewer_regions
from torch._dynamo.utils import counters
import torch

action, path, latents, *recorded = sys.argv[1:]
warnings.simplefilter("error", RuntimeWarning)
if recorded:
    import fastdiff.plan
    from support.tape_recorder import RunningRecorder
    fastdiff.plan.CudaRecorder = lambda device: RunningRecorder()
    fastdiff.plan.why_no_graphs = lambda requested, device: None
pipe = fewer_regions(load_fast(COMPILED, compiled=path if action == "load" else None))
if action == "save":
    pipe.warmup(sizes=[(64, 64)])
    graphs = counters["stats"]["unique_graphs"]
    pipe.save_compiled(path)
    saving = counters["stats"]["unique_graphs"] - graphs
torch.save(draw(pipe), latents)
if action == "save":
    assert counters["stats"]["unique_graphs"] == graphs + saving, "saving takes compiled code away"
caches = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
if recorded:
    assert "CUDA graphs" in pipe.explain()
print(json.dumps({**caches, "traced": counters["stats"]["unique_graphs"]}))
"""


def fewer_regions(pipe):
    """What has channels of its own, and what shares its graph with others."""
    pipe.unet._repeated_blocks, pipe.vae._repeated_blocks = ["BasicTransformerBlock", "Upsample2D"], []
    return pipe


def run(folder: Path, *arguments) -> dict:
    paths = [str(Path(__file__).parent), *map(str, Path(__file__).parents[1:3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def libraries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.so")}


def graphs(folder: Path) -> list[Path]:
    """What torch was given or has compiled."""
    return list(folder.glob("fxgraph/*/*/*"))


def rewritten(source: Path, target: Path, change) -> Path:
    """A file that is whole and says something else: `change` takes the key and the parts, to edit in place."""
    line, _, body = source.read_bytes().partition(b"\n")
    position = 8 + int.from_bytes(body[:8], "big")
    header, parts = json.loads(body[8:position]), {}
    for name, length in header["parts"].items():
        parts[name] = body[position : position + length]
        position += length
    change(header["key"], parts)
    header["parts"] = {name: len(content) for name, content in parts.items()}
    header = json.dumps(header).encode()
    body = len(header).to_bytes(8, "big") + header + b"".join(parts.values())
    name, number, _, _ = line.decode().split()
    line = f"{name} {number} {hashlib.sha256(body).hexdigest()} {len(body)}\n"
    target.write_bytes(line.encode() + body)
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """What a process saved, with the latents that it drew beside it."""
    folder = tmp_path_factory.mktemp("saved")
    counts = run(folder / "inductor", "save", folder / "code", folder / "latents.pt")
    assert counts["miss"] > 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return folder / "code"


@pytest.fixture
def inductor(tmp_path, monkeypatch) -> Path:
    """An empty folder for what inductor compiles or is given."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    yield tmp_path / "inductor"
    torch.compiler.reset()


def test_the_next_process_traces_and_compiles_nothing(saved, tmp_path, stock, assert_close):
    counts = run(tmp_path / "inductor", "load", saved, tmp_path / "latents.pt")
    assert counts == {"hit": 0, "miss": 0, "bypass": 0, "traced": 0}
    # Every library was in the file: none was built.
    parts = read_artifacts(saved).parts
    assert libraries(tmp_path / "inductor") == set(parts) - {"torch", "traces"}
    drawn = torch.load(tmp_path / "latents.pt")
    assert torch.equal(drawn, torch.load(saved.parent / "latents.pt"))
    assert_close(drawn, draw(stock))


def test_without_traces_the_next_process_compiles_nothing(saved, tmp_path):
    path = rewritten(saved, tmp_path / "untraced", lambda key, parts: parts.pop("traces"))
    counts = run(tmp_path / "inductor", "load", path, tmp_path / "latents.pt")
    assert counts["traced"] == counts["hit"] > 0 and counts["miss"] == 0 and counts["bypass"] == 0
    assert libraries(tmp_path / "inductor") == set(read_artifacts(path).parts) - {"torch"}
    assert torch.equal(torch.load(tmp_path / "latents.pt"), torch.load(saved.parent / "latents.pt"))


def test_what_runs_in_graphs_is_saved_too(tmp_path):
    """As on CUDA: regions are called, recorded, and saved without their traces."""
    code, latents = tmp_path / "code", [tmp_path / "first.pt", tmp_path / "second.pt"]
    made = run(tmp_path / "one", "save", code, latents[0], "recorded")
    assert made["miss"] > 0 and made["bypass"] == 0 and "traces" not in read_artifacts(code).parts
    loaded = run(tmp_path / "two", "load", code, latents[1], "recorded")
    assert loaded == {"hit": made["traced"], "miss": 0, "bypass": 0, "traced": made["traced"]}
    assert torch.equal(*map(torch.load, latents))


def test_loaded_traces_notice_an_adapter(saved, inductor, tmp_path, stock, assert_close):
    counters.clear()
    pipe = fewer_regions(load_fast(COMPILED, compiled=saved))
    assert_close(draw(pipe), draw(stock))
    assert counters["stats"]["unique_graphs"] == 0
    adapted, file = load_stock(), write_lora(load_stock(), tmp_path / "lora", seed=1)
    for each in (pipe, adapted):
        each.load_lora_weights(file)
    expected = draw(adapted)
    assert (expected - draw(stock)).abs().max() > 1e-2
    assert_close(draw(pipe), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_file_that_fits_is_given_to_torch_once(saved, inductor):
    pipe = load_fast(COMPILED, compiled=saved)
    assert not inductor.exists() or not graphs(inductor)
    assert fewer_regions(pipe).plan and graphs(inductor) and libraries(inductor)
    assert pipe._artifacts.installed and not pipe._artifacts.parts


def damage(data: bytearray, at: int) -> bytes:
    data[at] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("damaged: its checksum", lambda data: damage(data, -1)),
        ("damaged: its checksum", lambda data: damage(data, 200)),
        ("damaged: its checksum", lambda data: damage(data, len(data) // 2)),
        ("damaged: .* bytes in place of", lambda data: bytes(data[:-1])),
        ("damaged: .* bytes in place of", lambda data: bytes(data) + b"\0"),
        ("not written by save_compiled", lambda data: bytes(data[:40])),
        ("not written by save_compiled", lambda data: b""),
        ("not written by save_compiled", lambda data: b"PK" + bytes(data)),
        (f"format 9, and this version reads format {FORMAT}", lambda data: bytes(data).replace(b" 1 ", b" 9 ", 1)),
    ],
)
def test_a_damaged_file_is_not_read(saved, inductor, tmp_path, reason, spoil):
    path = tmp_path / "spoiled"
    path.write_bytes(spoil(bytearray(saved.read_bytes())))
    with pytest.warns(RuntimeWarning, match=f"compiled='{path}' is not used: .*{reason}"):
        assert read_artifacts(path) is None


def test_with_a_damaged_file_the_picture_is_right(saved, tmp_path, stock, assert_close):
    path = tmp_path / "spoiled"
    path.write_bytes(damage(bytearray(saved.read_bytes()), -1))
    torch.compiler.reset()
    with pytest.warns(RuntimeWarning, match="its checksum is wrong; fastdiff compiles as usual"):
        pipe = fewer_regions(load_fast(COMPILED, compiled=path))
    assert_close(draw(pipe), draw(stock))
    torch.compiler.reset()


@pytest.mark.parametrize("package", ["torch", "diffusers", "fastdiff", "python"])
def test_another_version_is_refused_while_loading(saved, inductor, tmp_path, package):
    path = rewritten(saved, tmp_path / "older", lambda key, parts: key.update({package: "0.0.1"}))
    with pytest.warns(RuntimeWarning, match=f"made for {package} 0.0.1, not "):
        pipe = load_fast(COMPILED, compiled=path)
    assert pipe.plan and not graphs(inductor) and not libraries(inductor)


def test_another_device_is_refused(saved, inductor, tmp_path):
    path = rewritten(saved, tmp_path / "other", lambda key, parts: key.update(device="cuda, H200 9.0"))
    pipe = load_fast(COMPILED, compiled=path)
    with pytest.warns(RuntimeWarning, match="made for device cuda, H200 9.0, not .* cpu, .* threads"):
        assert pipe.plan
    assert not graphs(inductor) and not libraries(inductor)


@pytest.mark.parametrize(
    ("difference", "options"),
    [
        ("dtype of the UNet torch.float32, not torch.bfloat16", {"dtype": torch.bfloat16}),
        ("compile mode regional, not full", {"compile": "full"}),
        ("plan .*fuse_qkv.*, not (?!.*fuse_qkv)", {"fuse_qkv": False}),
    ],
)
def test_another_plan_or_dtype_is_refused(saved, inductor, difference, options):
    dtype = options.pop("dtype", torch.float32)
    pipe = load_fast(FastConfig.preset("exact", **{"compile": "regional", **options}), compiled=saved).to(dtype)
    with pytest.warns(RuntimeWarning, match=f"made for .*{difference}"):
        assert pipe.plan
    assert not graphs(inductor) and not libraries(inductor)
    # The file is kept: the pipeline may yet become what it was made for.
    assert pipe._artifacts.parts


def test_names_of_parts_stay_inside_of_the_folder(saved, tmp_path):
    def escape(key, parts):
        parts["../../evil.so"] = b""

    with pytest.warns(RuntimeWarning, match="strange name"):
        assert read_artifacts(rewritten(saved, tmp_path / "strange", escape)) is None


def test_a_missing_file_is_an_error():
    with pytest.raises(ValueError, match="compiled='nowhere': there is no such file"):
        load_fast(COMPILED, compiled="nowhere")
    with pytest.raises(ValueError, match="compiled='nowhere': there is no such file"):
        type(load_fast()).from_pipe(load_fast(), compiled="nowhere")


def test_there_must_be_something_to_save(tmp_path):
    path = tmp_path / "code"
    with pytest.raises(RuntimeError, match="nothing is compiled yet; call pipe.warmup"):
        load_fast(COMPILED).save_compiled(path)
    for config in ("exact", "off"):
        pipe = load_fast(config)
        draw(pipe, num_inference_steps=1)
        with pytest.raises(RuntimeError, match="the plan compiles nothing"):
            pipe.save_compiled(path)
    assert not path.exists()


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    assert main(["warmup", "--save", str(tmp_path / "code")]) == 2
    assert "M parameters: compiling takes longer than it saves" in capsys.readouterr().err
    assert main(["generate", "a star", "-o", str(tmp_path / "a.png"), "--compiled", str(tmp_path / "code")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
