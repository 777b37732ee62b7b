"""The file that remembers: shared, damaged, foreign, unwritable, and cut off while it is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastdiff.tuning import Option, Outcome, Question, Tuner
from fastdiff.tuning.record import Record, default_path

MACHINE = {"processor": "one"}
ANSWERS = {"a": {"plain": Outcome(2.0), "fast": Outcome(1.0, (1.9, 2.0, 2.1), 0.01, None, False)}}


def test_what_is_written_is_read_and_belongs_to_one_machine(tmp_path):
    path = tmp_path / "deep" / "tuning.json"
    assert Record(path, MACHINE).load() == {}
    assert Record(path, MACHINE).add(ANSWERS) == ANSWERS
    assert Record(path, MACHINE).load() == ANSWERS
    assert Record(path, {"processor": "two"}).load() == {}
    Record(path, {"processor": "two"}).add({"b": ANSWERS["a"]})
    assert Record(path, MACHINE).load() == ANSWERS, "machines share the file, not the answers"
    assert {machine["machine"]["processor"] for machine in json.loads(path.read_text())["machines"].values()} == {
        "one",
        "two",
    }


def test_of_two_processes_the_first_ones_answers_hold_for_both(tmp_path):
    path, other = tmp_path / "tuning.json", {"a": {"plain": Outcome(9.0)}, "b": {"plain": Outcome(3.0)}}
    first, second = Record(path, MACHINE), Record(path, MACHINE)
    assert first.load() == second.load() == {}
    first.add(ANSWERS)
    assert second.add(other) == {**ANSWERS, "b": other["b"]}
    assert second.add(other, replace=True) == other == first.load()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1, 2]", b'{"format": "another", "version": 1}'])
def test_a_file_that_cannot_be_read_costs_one_warning_and_is_replaced(content, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="measured again"):
        assert Record(path, MACHINE).load() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Record(path, MACHINE).add(ANSWERS)
    assert Record(path, MACHINE).load() == ANSWERS


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="FastConfig.tuning"):
        assert Record(tmp_path / "file" / "tuning.json", MACHINE).add(ANSWERS) == ANSWERS


def asked(key: str, calls: list[str]) -> Question:
    def make():
        calls.append(key)
        return lambda x: x

    return Question(key, (Option("plain", make),), lambda kind, share: (torch.zeros(2, 2),))


def test_a_question_is_asked_once_and_again_only_on_demand(tmp_path):
    calls: list[str] = []

    def questions(keys: set[str]) -> list[Question]:
        return [asked(key, calls) for key in sorted(keys)]

    def tuner() -> Tuner:
        return Tuner(str(tmp_path / "tuning.json"), torch.device("cpu"))

    one = tuner()
    assert one.ask(["a", "b", "a"], questions).keys() == {"a", "b"} and calls == ["a", "b"]
    one.ask(["a"], questions)
    tuner().ask(["a", "c"], questions)
    assert calls == ["a", "b", "c"]
    tuner().ask(["a"], questions, again=True)
    assert calls == ["a", "b", "c", "a"]
    other = Tuner(str(tmp_path / "tuning.json"), torch.device("cpu"), {"activations": "operators"})
    assert other.ask(["a"], questions) and calls[-1] == "a", "other facts, other answers"


def test_what_the_plain_option_raises_costs_a_warning(tmp_path):
    def broken() -> None:
        raise RuntimeError("out of memory")

    def questions(keys: set[str]) -> list[Question]:
        return [Question("a", (Option("plain", broken),), lambda kind, share: (torch.zeros(2, 2),))]

    with pytest.warns(UserWarning, match="out of memory"):
        assert Tuner(str(tmp_path / "tuning.json"), torch.device("cpu")).ask(["a"], questions) == {}


def test_the_default_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "fastdiff" / "tuning.json"


def write(path: Path, name: str, count: int) -> None:
    for index in range(count):
        answers = {f"{name} {index}": {"plain": Outcome(index)}, "large": {str(n): Outcome(n) for n in range(500)}}
        Record(path, MACHINE).add(answers)


def writing(path: Path, name: str, count: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=write, args=(path, name, count))
    process.start()
    return process


def test_a_process_that_is_killed_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "tuning.json"
    process = writing(path, "killed", 10_000)
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    held = Record(path, MACHINE).load()
    assert "killed 0" in held and len(held["large"]) == 500
    now = Record(path, MACHINE).add({"later": {"plain": Outcome(1.0)}})
    assert now.keys() > {"killed 0", "later"}, "no lock is left"


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "tuning.json"
    processes = [writing(path, name, 10) for name in ("one", "two")]
    for process in processes:
        process.join()
    assert Record(path, MACHINE).load().keys() == {"large"} | {f"{n} {i}" for n in ("one", "two") for i in range(10)}
