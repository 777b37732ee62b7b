"""`fastdiff batch`: rows, the output folder, and a job that loses an actor and its driver."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("ray.data", reason="needs Ray")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402
from support.embedded import load_stock  # noqa: E402
from support.loras import write_lora  # noqa: E402

from fastdiff.cli.main import UsageError, main  # noqa: E402
from fastdiff.pipelines import loras  # noqa: E402
from fastdiff.scale.artist import Artist, ModelChoice, png_bytes  # noqa: E402
from fastdiff.scale.batch import _BatchActor  # noqa: E402
from fastdiff.scale.folder import MANIFEST, OutputFolder  # noqa: E402
from fastdiff.scale.rows import read_rows  # noqa: E402

# 24 rows in the default run; FASTDIFF_BATCH_ROWS=200 for the run that is reported.
ROWS = int(os.environ.get("FASTDIFF_BATCH_ROWS", "24"))
START_SECONDS = 300
COLOURS = ("red", "green", "blue")
COMMAND = [sys.executable, "-c", "import sys; from fastdiff.cli import main; sys.exit(main())", "batch"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def manifest(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]


# Rows


def test_rows_keep_their_seed_and_key_when_lines_move(tmp_path):
    first = {"prompt": "a red circle"}
    second = {"prompt": "a blue square", "seed": 7, "size": "64x128", "steps": 3}
    one = read_rows(write_rows(tmp_path / "one", [first, second]), {"model": None})
    other = read_rows(write_rows(tmp_path / "other", [second, {"prompt": "new"}, first]), {"model": None})
    assert {row.key for row in one} < {row.key for row in other}
    assert [row.request.seed for row in one] == [other[2].request.seed, 7]
    assert one[1].file_name == f"a-blue-square-{one[1].key}.png"


def test_equal_rows_are_different_pictures_unless_their_seed_is_given(tmp_path):
    lines = [{"prompt": "x"}] * 3 + [{"prompt": "x", "seed": 5}] * 2
    rows = read_rows(write_rows(tmp_path / "p.jsonl", lines), {})
    assert len({row.request.seed for row in rows}) == 4
    assert len({row.file_name for row in rows}) == 5


def test_another_model_makes_other_keys(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "x"}])
    assert read_rows(path, {"model": "a"})[0].key != read_rows(path, {"model": "b"})[0].key


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ', "line 2"),
        ("[1]", "line 2"),
        ('{"prompt": 3}', "prompt"),
        ('{"prompt": "  "}', "prompt"),
        ('{"steps": 3}', "prompt"),
        ('{"prompt": "x", "steps": true}', "steps"),
        ('{"prompt": "x", "steps": "3"}', "steps"),
        ('{"prompt": "x", "size": "65x64"}', "multiples of 8"),
        ('{"prompt": "x", "size": "../x"}', "size"),
        ('{"prompt": "x", "seed": -1}', "seed"),
        ('{"prompt": "x", "guidance": NaN}', "line 2"),
        ('{"prompt": "x", "model": "../other"}', "model"),
        ('{"prompt": "x", "lora": 3}', "lora"),
        ('{"prompt": "x", "lora": ["no/such.safetensors:0.5"]}', "no/such.safetensors"),
    ],
)
def test_bad_rows_end_the_command_before_any_work(tmp_path, capsys, line, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n', encoding="utf-8")
    assert main(["batch", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error and "line 2" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_row_is_drawn_with_its_adapters_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(loras, "_KEPT", 1)  # so that one is let go and read again
    one, two = (str(write_lora(load_stock(), tmp_path / str(seed), seed)) for seed in (1, 2))
    plain = {"prompt": "a red circle", "seed": 1, "steps": 2, "size": "64x64"}
    wanted = [plain, {**plain, "lora": one}, {**plain, "lora": [f"{one}:0.5", two]}, plain, {**plain, "lora": [two]}]
    rows = read_rows(write_rows(tmp_path / "p.jsonl", wanted), {})
    assert len({row.key for row in rows}) == 5
    without = read_rows(write_rows(tmp_path / "q.jsonl", [plain]), {})
    assert without[0].key == rows[0].key
    actor = _BatchActor(ModelChoice(model=None, preset="exact", dtype="float32", device="cpu", threads=1))
    for row in rows:
        answer = actor({"key": row.key, "request": row.request.model_dump_json()})
        assert not answer["error"]
        stock = load_stock()
        for index, (file, _) in enumerate(row.request.loras):
            stock.load_lora_weights(file, adapter_name=f"a{index}")
        if row.request.loras:
            stock.set_adapters([f"a{i}" for i in range(len(row.request.loras))], [w for _, w in row.request.loras])
        expected = stock(
            "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(1), width=64, height=64
        ).images[0]
        drawn = np.asarray(Image.open(io.BytesIO(answer["png"])), dtype=int)
        assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 2, row


def test_a_row_with_a_file_that_is_no_lora_fails_alone(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    plain = {"prompt": "a red circle", "seed": 1, "steps": 1, "size": "64x64"}
    bad, good = read_rows(write_rows(tmp_path / "p.jsonl", [{**plain, "lora": str(other)}, plain]), {})
    actor = _BatchActor(ModelChoice(model=None, preset="exact", dtype=None, device="cpu", threads=1))
    assert "other.safetensors" in actor({"key": bad.key, "request": bad.request.model_dump_json()})["error"]
    assert not actor({"key": good.key, "request": good.request.model_dump_json()})["error"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--preset", "fastest"], "fastest"),
        (["--model", "no/such/model/here"], "no/such/model"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, says):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "x"}])
    assert main(["batch", str(path), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_missing_and_empty_files(tmp_path, capsys):
    assert main(["batch", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["batch", str(write_rows(tmp_path / "p", [])), "--out", str(tmp_path / "out")]) == 2
    assert "no rows" in capsys.readouterr().err


def test_without_ray_the_command_names_the_extra():
    code = "import sys; sys.modules['ray'] = None; from fastdiff.cli import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "pip install '.[ray]'" in ended.stderr and ended.stderr.count("\n") == 1


# The folder


def line_for(key):
    return {"key": key, "file": f"{key}.png", "prompt": "naïve"}


def test_a_torn_line_and_half_written_files_are_dropped(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.add(line_for("a"), b"A")
    folder.add(line_for("b"), b"B")
    folder.close()
    whole = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / ".c.png.partial").write_bytes(b"half")
    for cut in range(len(whole.splitlines(True)[0]) + 1, len(whole)):
        (tmp_path / MANIFEST).write_bytes(whole[:cut])
        folder = OutputFolder(tmp_path)
        assert folder.done == {"a"}
        folder.close()
    folder = OutputFolder(tmp_path)
    folder.add(line_for("b"), b"B again")
    folder.close()
    assert [line["key"] for line in manifest(tmp_path)] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.png", "b.png", MANIFEST]


def test_a_picture_that_cannot_be_written_has_no_line(tmp_path):
    folder = OutputFolder(tmp_path)
    with pytest.raises(OSError):
        folder.add({"key": "a", "file": "no-such-folder/a.png"}, b"A")
    folder.close()
    assert folder.done == set() and (tmp_path / MANIFEST).read_bytes() == b""


def test_a_row_whose_picture_is_gone_is_not_done(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.add(line_for("a"), b"A")
    folder.add(line_for("b"), b"B")
    folder.close()
    (tmp_path / "a.png").unlink()
    folder = OutputFolder(tmp_path)
    assert folder.done == {"b"}
    folder.close()
    assert [line["key"] for line in manifest(tmp_path)] == ["b"]


def test_a_folder_serves_one_job_and_keeps_foreign_manifests(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    with pytest.raises(UsageError, match="another batch job"):
        OutputFolder(tmp_path / "out")
    folder.close()
    (tmp_path / "out" / MANIFEST).write_text('{"mine": 1}\n')
    with pytest.raises(UsageError, match="line 1"):
        OutputFolder(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_text() == '{"mine": 1}\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        OutputFolder(tmp_path / "file")


# The job


def processes_of(driver):
    """The driver's whole tree, found while it is alive; Ray's own processes included."""
    return psutil.Process(driver.pid).children(recursive=True)


def actors_of(driver):
    return [p for p in processes_of(driver) if p.is_running() and "_BatchActor" in " ".join(p.cmdline())]


def wait_until(condition, what, seconds=START_SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.02)


def start(prompts, out, log):
    arguments = ["--out", str(out), "--preset", "exact", "--device", "cpu", "--replicas", "2"]
    return subprocess.Popen([*COMMAND, str(prompts), *arguments], stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two actors need two CPU cores")
def test_no_row_is_lost_or_doubled_when_an_actor_and_the_driver_are_killed(tmp_path):
    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": f"a {COLOURS[number % 3]} circle", "size": "64x64", "steps": 12, "seed": number}
            for number in range(ROWS)
        ],
    )
    out, log = tmp_path / "out", open(tmp_path / "log", "w")

    def lines():
        return (out / MANIFEST).read_bytes().count(b"\n") if (out / MANIFEST).exists() else 0

    first = start(prompts, out, log)
    tree, workers = [], []
    try:
        wait_until(lambda: lines() >= 2 or first.poll() is not None, "picture")
        assert first.poll() is None, (tmp_path / "log").read_text()
        victim = actors_of(first)[0]
        victim.send_signal(signal.SIGKILL)
        at_actor_kill = lines()
        # The second actor, or a new one, goes on.
        wait_until(lambda: lines() >= at_actor_kill + ROWS // 4, "picture after the actor was killed")
        tree, workers = processes_of(first), actors_of(first)
        first.send_signal(signal.SIGKILL)
        at_driver_kill = lines()
        first.wait(30)
    finally:
        first.kill()
        # Ray's processes end with the driver; its agents, which hold nothing, take their time.
        _, alive = psutil.wait_procs(workers, timeout=30)
        for process in tree:
            if process.is_running():
                process.kill()
    assert not alive
    assert 2 <= at_actor_kill < at_driver_kill < ROWS, "the kills came too late to test anything"
    kept = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.png")}
    done_before = {line["file"] for line in manifest(out)} if lines() else set()

    second = start(prompts, out, log)
    try:
        assert second.wait(START_SECONDS + 2 * ROWS) == 0, (tmp_path / "log").read_text()
    finally:
        second.kill()

    rows = read_rows(prompts, {"model": None, "preset": "exact", "dtype": None})
    entries = manifest(out)
    assert sorted(entry["key"] for entry in entries) == sorted(row.key for row in rows)
    assert {p.name for p in out.iterdir()} == {row.file_name for row in rows} | {MANIFEST, ".lock"}
    for name in done_before:
        assert ((out / name).stat().st_mtime_ns, (out / name).read_bytes()) == kept[name], "done again"
    for entry in entries:
        assert hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["size"] == "64x64" and entry["steps"] == 12 and entry["versions"]["fastdiff"]

    # A run without faults: one process, no Ray, other rows before each row.
    threads = entries[0]["threads"]
    artist = Artist(ModelChoice(model=None, preset="exact", dtype=None, device="cpu", threads=threads))
    for row in rows:
        [picture] = artist.draw([row.request])
        drawn = np.asarray(Image.open(io.BytesIO((out / row.file_name).read_bytes())))
        assert np.array_equal(drawn, np.asarray(picture)), row
        assert png_bytes(picture) == (out / row.file_name).read_bytes()
    print(f"{ROWS} rows: actor killed after {at_actor_kill}, driver after {at_driver_kill}; all bit-equal")

    assert main(["batch", str(prompts), "--out", str(out), "--preset", "exact"]) == 0
    assert manifest(out) == entries
