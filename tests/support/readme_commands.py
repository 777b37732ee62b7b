"""Runs what the README says, as a newcomer would: its shell lines and its Python, taken from the text.

    python tests/support/readme_commands.py             # in a fresh environment and a clone of this repository
    python tests/support/readme_commands.py --no-tests  # but for the line that passes the tests
    python tests/support/readme_commands.py --network   # the model that the Python names comes from the hub

Takes a quarter of an hour, most of it for the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HUB_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def blocks(language: str, text: str | None = None) -> list[str]:
    """The README's code blocks of a language, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") if text is None else text
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    """The README's shell commands, a line each, without comments."""
    lines = [line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def script(network: bool = False) -> str:
    """The README's Python as one program; without the hub the embedded model stands in, without CUDA the CPU."""
    text = "\n".join(blocks("python"))
    if not network:
        text = text.replace(HUB_MODEL, "embedded")
    # Where it runs, and not here, is PyTorch installed.
    return "import torch\n" + text.replace('.to("cuda")', '.to("cuda" if torch.cuda.is_available() else "cpu")')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--network", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, environment = Path(folder) / "fastdiff", Path(folder) / "venv"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        venv.create(environment, with_pip=True)
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(environment)}
        lines = shell_lines()
        if arguments.no_tests:
            lines = [line.replace("python -m pytest", "python -m pytest --collect-only -q") for line in lines]
        for line in lines:
            _run(["bash", "-euc", line], line, clone, variables)
        # In another folder, so that it is the installed package that runs.
        program = [str(environment / "bin" / "python"), "-c", script(arguments.network)]
        _run(program, "the Python blocks", Path(folder), variables)
        _run(["ls", "-l", *sorted(path.name for path in clone.glob("*.png"))], "pictures", clone, variables)
    return 0


def _run(command: list[str], shown: str, folder: Path, variables: dict) -> None:
    print(f"$ {shown}", flush=True)
    before = time.monotonic()
    code = subprocess.run(command, cwd=folder, env=variables).returncode
    print(f"  exit code {code} after {time.monotonic() - before:.0f} s", flush=True)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
