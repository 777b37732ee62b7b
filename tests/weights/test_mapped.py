"""Pages of a mapped checkpoint go as forms take the place of weights, and come back for whoever reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff.bench.timing import Memory
from fastdiff.weights import sources
from fastdiff.weights.mapped import MappedFiles
from fastdiff.weights.sources import Checkpoint, WeightsFile

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped where")


@pytest.fixture
def weights(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "w.safetensors"
    save_file({name: torch.full((4096, 2048), value) for name, value in (("a", 1.0), ("b", 2.0))}, path)
    return path, load_file(path)


def test_pages_go_and_come_back(weights):
    path, tensors = weights
    memory = Memory("cpu")
    assert tensors["a"].sum() + tensors["b"].sum() == 3 * 4096 * 2048
    held = memory.current()
    MappedFiles([path]).let_go()
    assert held - memory.current() > 32 * MIB
    assert (tensors["a"] == 1).all() and (tensors["b"] == 2).all()


def test_what_was_edited_stays(weights):
    path, tensors = weights
    tensors["a"][7] = 5.0
    MappedFiles([path]).let_go()
    assert (tensors["a"][7] == 5).all() and (tensors["a"][8] == 1).all()


def test_they_go_every_few_layers(weights, monkeypatch):
    path, tensors = weights
    assert tensors["a"].sum() > 0
    memory, model = Memory("cpu"), nn.Module()
    model.weights_files = [WeightsFile(path)]
    monkeypatch.setattr(sources, "LAYERS_AT_A_TIME", 2)
    held = memory.current()
    layers = Checkpoint(model).converting(range(5))
    assert [next(layers), next(layers)] == [0, 1]
    assert held - memory.current() < MIB
    assert next(layers) == 2
    assert held - memory.current() > 16 * MIB
    assert list(layers) == [3, 4]


def test_other_files_are_left_alone(weights, tmp_path):
    _, tensors = weights
    memory = Memory("cpu")
    assert tensors["a"].sum() > 0
    held = memory.current()
    MappedFiles([tmp_path / "other.safetensors"]).let_go()
    assert held - memory.current() < MIB
