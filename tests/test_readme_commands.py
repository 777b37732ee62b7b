"""What the README says works: its command lines, and its Python.

`python tests/support/readme_commands.py` runs all of it in a fresh environment, with installing and at full size.
"""

from __future__ import annotations

import contextlib
import io
import shlex

import pytest
from PIL import Image
from support.readme_commands import blocks, script, shell_lines

from fastdiff.cli import main

# Installing, and what takes minutes or gigabytes; the demo is run without its part of full size.
ELSEWHERE = ("pip ", "--model sdxl-random")
LINES = [line for line in shell_lines() if not any(part in line for part in ELSEWHERE)]


def test_there_are_two_commands():
    install, tests = blocks("sh")[0].splitlines()
    assert install.startswith("pip install torch==") and install.endswith("fastdiff demo")
    assert tests == "pip install '.[test]' && python -m pytest"


@pytest.mark.parametrize("line", LINES)
def test_a_line_does_as_it_says(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *words = shlex.split(line)
    assert command == "fastdiff" and main(words) == 0
    if "-o" in words:
        Image.open(tmp_path / words[words.index("-o") + 1]).verify()


def test_the_demo_draws_one_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--no-full-size"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
    assert Image.open("demo.png").width > 1000
    assert "PSNR between the two" in capsys.readouterr().out


def test_the_python_runs(tmp_path, monkeypatch):
    """But for saving compiled code, which the tests of the compiler do."""
    monkeypatch.chdir(tmp_path)
    program = script().partition("pipe.warmup(")[0]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(program, "README.md", "exec"), {})
    assert "context_cache" in said.getvalue()
