"""C++ of ours: compiled once, kept, made anew where it is damaged, and done without where there is no compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import fastdiff
from fastdiff.native import load_library

HOUSE = Path(fastdiff.__file__).parent
SOURCES = sorted(HOUSE.rglob("*.cpp"))
load = load_library.__wrapped__
compiled = pytest.mark.skipif(load_library(SOURCES[0]) is None, reason="needs a C++ compiler")


@compiled
@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_a_library_is_kept_and_a_damaged_one_is_made_anew(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert load(source) is not None
    (library,) = tmp_path.rglob("*.so")
    before = library.stat().st_mtime_ns
    assert load(source) is not None and library.stat().st_mtime_ns == before, "made once"
    damaged = tmp_path / "other" / "fastdiff" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert load(source) is not None and damaged.stat().st_size > 1000
    assert not list(tmp_path.rglob(".*")), "nothing half made is left"


@pytest.mark.parametrize("compiler", ["/does/not/exist", "false"])
def test_without_a_compiler_that_works_there_is_none(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert load(SOURCES[0]) is None


@compiled
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "fastdiff").write_text("in the way of the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert isinstance(load(SOURCES[0]), ctypes.CDLL)
