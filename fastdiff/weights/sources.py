"""Where the plain weight of a lossy form comes back from: the checkpoint's own file, or a copy in host memory."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..models.form import Source
from .mapped import LAYERS_AT_A_TIME, MappedFiles

T = TypeVar("T")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes that are read at a time: they stay in the cache while they are compared.
_PIECE = 1 << 21
_PARTS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Kept:
    """A plain weight in host memory, for one that no file holds: made in memory, edited, merged with a LoRA."""

    weight: torch.Tensor

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.weight.nbytes

    def read(self) -> torch.Tensor:
        """The weight."""
        return self.weight.clone()


@dataclass(frozen=True)
class InFile:
    """A plain weight in a safetensors file, cast as at loading; one place for each of the parts that it joins."""

    file: WeightsFile
    names: tuple[str, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Nothing."""
        return 0

    def read(self) -> torch.Tensor:
        """The weight, read from the file.

        Raises:
            OSError: the file has changed or vanished.
        """
        self.file.check()
        parts = [self.file.tensor(name) for name in self.names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.dtype)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether the file has this very weight, bit for bit."""
        parts = weight.detach().cpu().chunk(len(self.names))
        try:
            return all(self._has(name, part) for name, part in zip(self.names, parts, strict=True))
        except OSError:
            return False

    def _has(self, name: str, part: torch.Tensor) -> bool:
        if self.file.shape(name) != part.shape:
            return False
        numbers, start = part.reshape(-1), 0
        for stored in self.file.pieces(name):
            end = start + len(stored)
            if not _same_bits(stored.to(self.dtype), numbers[start:end]):
                return False
            start = end
        return True


class WeightsFile:
    """One safetensors file: its header, read once, and its tensors, read when they are asked for.

    Read and not mapped: a file that shrinks under a mapping ends the process.

    Args:
        path: the file.
        renamed: names as the model has them to names as the file has them, for files in another layout.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None):
        self.path, self._renamed = path, renamed
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size:
                raise ValueError(f"{path} is no safetensors file")
            self._header = json.loads(file.read(length))
        self._start, self._stat = 8 + length, self._look()

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._header

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightsFile) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self.path)

    def _identity(self) -> tuple:
        return self.path, self._stat, self._renamed

    def _stored(self, name: str) -> str:
        return name if self._renamed is None else self._renamed.get(name, "")

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return torch.Size(self._header[self._stored(name)]["shape"])

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, as the file has it."""
        found = torch.empty(self.shape(name), dtype=self._dtype(name))
        # By several threads: it is the system's work, which finds memory for what is read.
        parts = found.view(-1).chunk(min(torch.get_num_threads(), -(-found.nbytes // _PIECE)) or 1)
        starts = itertools.accumulate((part.nbytes for part in parts), initial=0)
        with ThreadPoolExecutor(len(parts)) as readers:
            list(readers.map(functools.partial(self._fill, name), parts, starts))
        return found

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Read a tensor's numbers in their order, some at a time; each piece is overwritten by the next."""
        dtype, count = self._dtype(name), self.shape(name).numel()
        buffer = torch.empty(min(count, _PIECE // dtype.itemsize), dtype=dtype)
        for start in range(0, count, max(1, len(buffer))):
            piece = buffer[: count - start]
            self._fill(name, piece, start * dtype.itemsize)
            yield piece

    def _fill(self, name: str, numbers: torch.Tensor, skipped: int) -> None:
        """Read numbers that lie so many bytes behind the first of a tensor."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._header[self._stored(name)]["data_offsets"][0] + skipped)
            into = numbers.view(torch.uint8).numpy().data
            while len(into):
                if not (count := file.readinto(into)):
                    raise OSError(f"{self.path} ends before the tensor {name!r} does")
                into = into[count:]

    def _dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._header[self._stored(name)]["dtype"]]

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of a kind that weights are read in."""
        return self._header[self._stored(name)]["dtype"] in _DTYPES

    def check(self) -> None:
        """Make sure that the file is still the one whose weights were compared with the model's.

        Raises:
            OSError: it has changed or vanished.
        """
        try:
            changed = self._look() != self._stat
        except OSError as error:
            raise OSError(self._complaint("cannot be read any more")) from error
        if changed:
            raise OSError(self._complaint("has changed since the model was loaded from it"))

    def _look(self) -> tuple[int, int, int]:
        stat = os.stat(self.path)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _complaint(self, what: str) -> str:
        return (
            f"The plain weights of this model are in {str(self.path)!r}, which {what}. Pictures can still be drawn; "
            "for what needs plain weights (merging a LoRA, saving, moving, editing) put the file back, or load the "
            "model anew."
        )


class Checkpoint:
    """The files that a model may have been loaded from, asked for one weight after the other.

    What they hold is compared with the model bit for bit, so that a weight which was edited, or a file of another
    model, is never taken for its source.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    @functools.cached_property
    def files(self) -> list[WeightsFile]:
        """Those in the folder that the model's configuration names, or those of the model's `weights_files`."""
        files = list(getattr(self._model, "weights_files", ()))
        folder = getattr(getattr(self._model, "config", None), "_name_or_path", None)
        if not files and folder and Path(folder).is_dir():
            for path in sorted(Path(folder).glob("*.safetensors")):
                try:
                    files.append(WeightsFile(path))
                except (OSError, ValueError):
                    continue
        return files

    def converting(self, layers: Iterable[T]) -> Iterator[T]:
        """Go through layers that get another form, and let the pages of the mapped files go on the way.

        The files are looked for when there is a layer.
        """
        mapped = None
        for count, layer in enumerate(layers, start=1):
            mapped = mapped or MappedFiles(file.path for file in self.files)
            yield layer
            if count % LAYERS_AT_A_TIME == 0:
                mapped.let_go()
        if mapped is not None:
            mapped.let_go()

    def source(self, layer: str, weight: torch.Tensor, copy: bool = False) -> Source:
        """Where a layer's plain weight can be had again once it is let go.

        Args:
            layer: name of the layer in the model; a fused projection is looked up by its parts.
            weight: as it is now.
            copy: whether `weight` is going to be changed in place, so that keeping it takes a copy.
        """
        names = tuple(_stock_names(layer))
        for file in self.files:
            if all(name in file and file.is_float(name) for name in names):
                source = InFile(file, names, weight.dtype)
                if source.holds(weight):
                    return source
        kept = weight.detach().cpu().contiguous()
        return Kept(kept.clone() if copy else kept)


def _stock_names(layer: str) -> Iterator[str]:
    layer = layer.replace(".base_layer", "")
    stem, _, last = layer.rpartition(".")
    for part in _PARTS if last == "to_qkv" else (last,):
        yield f"{stem}.{part}.weight" if stem else f"{part}.weight"


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    # As the widest integers that they fill, of which there are fewer to compare.
    fill = all(x.nbytes % 8 == 0 and x.storage_offset() * x.itemsize % 8 == 0 for x in (first, second))
    wide = torch.int64 if fill else torch.uint8
    return torch.equal(first.view(wide), second.view(wide))


def free_memory() -> int | None:
    """Bytes of host memory that are free, or can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
