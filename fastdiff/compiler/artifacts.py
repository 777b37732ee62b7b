"""Compiled code in a file, so that the next process need not compile.

The file is one line of text, a JSON header and the payload:

    fastdiff-artifacts <format> <sha256 of all that follows the line> <length of all that follows the line>
    <length of the header, 8 bytes> <header> <payload>

The payload is what `torch.compiler.save_cache_artifacts` returns, and beside it the shared libraries that inductor
built with the C++ compiler, which torch 2.13 keeps out of its own artifacts and which on a CPU are most of the time,
and what `traces.py` records.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import diffusers
import torch

from .. import __version__
from .traces import install_traces

FORMAT = 1
_MAGIC = "fastdiff-artifacts"
_FIRST_LINE = re.compile(rf"{_MAGIC} (\d+) ([0-9a-f]{{64}}) (\d+)\n".encode())
_CACHES, _TRACES = "torch", "traces"
# As inductor names them: a folder of two letters, and a name that is a hash.
_LIBRARY = re.compile(r"\w{2}/\w+(\.main)?\.so")
_LOADING = "fastdiff compiles as usual"


@dataclass
class Artifacts:
    """Compiled code read from a file: whole and of these versions. Whether it fits the pipeline is seen later.

    Attributes:
        path: where it was read, for messages.
        key: what it was made for; see `artifact_key`.
        parts: name to bytes.
        installed: whether torch has been given it.
    """

    path: str
    key: dict
    parts: dict[str, bytes]
    installed: bool = False

    def install(self, key: dict, models: list[torch.nn.Module]) -> None:
        """Give the compiled code to torch if it was made for `key`, or else warn and say what differs.

        Nothing is done a second time: what torch has been given stays in its caches.

        Args:
            models: of the pipeline, with regions that have not run yet.
        """
        if self.installed:
            return
        if differences := _differences(self.key, key):
            _refuse(self.path, f"it was made for {differences}")
            return
        self.installed = True
        parts, self.parts = self.parts, {}
        try:
            if torch.compiler.load_cache_artifacts(parts.pop(_CACHES)) is None:
                _refuse(self.path, "torch cannot read its part of it")
                return
            traces = parts.pop(_TRACES, None)
            folder = _inductor_folder()
            for name, content in parts.items():
                if not (folder / name).exists():
                    write_atomically(folder / name, [content])
            if traces is not None:
                install_traces(models, traces)
        except OSError as error:
            _refuse(self.path, f"it could not be unpacked: {error}")


def artifact_key(unet: torch.nn.Module, vae: torch.nn.Module, device: torch.device, mode: str, steps: list) -> dict:
    """What compiled code depends on, beside the graphs themselves, which torch compares.

    Args:
        device: where the models run.
        mode: how they are compiled, `"regional"` or `"full"`.
        steps: of the pipeline's plan.
    """
    return {
        **_versions(),
        "device": _device(device),
        "dtype of the UNet": str(unet.dtype),
        "dtype of the VAE": str(vae.dtype),
        "compile mode": mode,
        "quantization": next((step.reason for step in steps if step.name == "quantize" and step.applied), "none"),
        "plan": ", ".join(step.name for step in steps if step.applied),
    }


def save_artifacts(path: str | os.PathLike, key: dict, traces: bytes | None) -> None:
    """Write all that torch has compiled in this process to a file, at once or not at all.

    Args:
        traces: of `record_traces`.

    Raises:
        RuntimeError: torch kept nothing.
        OSError: the file cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise RuntimeError(
            "save_compiled: torch kept nothing of what it compiled. Its caches are switched off, for example by "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES; switch them on and call warmup in a new process."
        )
    parts = {_CACHES: saved[0], **({} if traces is None else {_TRACES: traces}), **_libraries()}
    header = json.dumps({"key": key, "parts": {name: len(content) for name, content in parts.items()}}).encode()
    body = [len(header).to_bytes(8, "big"), header, *parts.values()]
    digest = hashlib.sha256()
    for piece in body:
        digest.update(piece)
    line = f"{_MAGIC} {FORMAT} {digest.hexdigest()} {sum(map(len, body))}\n"
    write_atomically(Path(path), [line.encode(), *body])


def read_artifacts(path: str | os.PathLike | None) -> Artifacts | None:
    """Read what `save_artifacts` wrote; None, after a warning with the reason, if it is damaged or of other versions.

    Nothing of the file is unpickled or run here, and nothing of a damaged one later.

    Raises:
        ValueError: there is no such file.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"compiled={str(path)!r}: there is no such file. Write one with pipe.save_compiled(path).")
    data = memoryview(Path(path).read_bytes())
    match = _FIRST_LINE.match(data[:200])
    if match is None:
        return _refuse(path, "it was not written by save_compiled")
    body, stated = data[match.end() :], int(match[3])
    if int(match[1]) != FORMAT:
        return _refuse(path, f"it has format {int(match[1])}, and this version reads format {FORMAT}")
    if len(body) != stated:
        return _refuse(path, f"it is damaged: {len(body)} bytes in place of {stated}")
    if hashlib.sha256(body).hexdigest() != match[2].decode():
        return _refuse(path, "it is damaged: its checksum is wrong")
    position = 8 + int.from_bytes(body[:8], "big")
    header = json.loads(bytes(body[8:position]))
    if differences := _differences({name: header["key"].get(name) for name in _versions()}, _versions()):
        return _refuse(path, f"it was made for {differences}")
    parts = {}
    for name, length in header["parts"].items():
        if name not in (_CACHES, _TRACES) and not _LIBRARY.fullmatch(name):
            return _refuse(path, f"it holds a part of a strange name, {name!r}")
        parts[name] = bytes(body[position : position + length])
        position += length
    return Artifacts(str(path), header["key"], parts)


def write_atomically(path: Path, pieces: list[bytes]) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _versions() -> dict:
    return {
        "fastdiff": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        # Libraries are built for this very processor (-march=native), and for a number of threads.
        features = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
        digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:8]
        level = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} cpu, {level} ({digest}), {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    capability = ".".join(map(str, module.get_device_capability(device))) if device.type == "cuda" else ""
    return f"{device.type}, {module.get_device_name(device)} {capability}".rstrip()


def _differences(made_for: dict, here: dict) -> str:
    differing = [name for name in {**here, **made_for} if made_for.get(name) != here.get(name)]
    return "; ".join(f"{name} {made_for.get(name)}, not {here.get(name)}" for name in differing)


def _refuse(path: str | os.PathLike, reason: str) -> Any:
    warnings.warn(f"compiled={str(path)!r} is not used: {reason}; {_LOADING}.", RuntimeWarning, stacklevel=2)


def _inductor_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def _libraries() -> dict[str, bytes]:
    """The shared libraries that inductor's code in this process uses, by their paths in its folder.

    Removable once torch takes them into its own artifacts, as it does with Triton's kernels.
    """
    folder = _inductor_folder()
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in loaded if file and file.endswith(tuple(EXTENSION_SUFFIXES))}
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.is_relative_to(folder)}
    # What inductor builds to see which instructions the processor has, seconds for each kind.
    for source in folder.glob("??/*.cpp"):
        library = source.with_suffix(".so")
        if not source.name.endswith(".main.cpp") and library.exists() and "chk_kernel" in source.read_text():
            found[library.relative_to(folder).as_posix()] = library
    return {name: path.read_bytes() for name, path in sorted(found.items())}
