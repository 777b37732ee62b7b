"""FastConfig: presets, validation and what `fast=` accepts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastdiff import FastConfig


def test_presets_differ_and_balanced_is_the_default():
    presets = {name: FastConfig.preset(name) for name in ("exact", "balanced", "max", "off")}
    assert len({repr(config) for config in presets.values()}) == 4
    assert FastConfig() == presets["balanced"] == FastConfig.resolve(None)
    assert presets["exact"].quantization == "none"
    assert presets["max"].compile == "full"
    assert presets["off"].is_off and not presets["exact"].is_off
    assert dataclasses.replace(presets["off"], dtype=torch.float16).is_off


def test_overrides_and_immutability():
    config = FastConfig.preset("exact", fuse_qkv=False)
    assert not config.fuse_qkv and config.context_cache
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fuse_qkv = True


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FastConfig.preset("ballanced"), ValueError, ("ballanced", "Did you mean 'balanced'")),
        (lambda: FastConfig.preset("exact", fuse_qvk=True), TypeError, ("fuse_qvk", "Did you mean 'fuse_qkv'")),
        (lambda: FastConfig(fuse_qvk=True), TypeError, ("fuse_qvk",)),
        (lambda: FastConfig(compile="yes"), ValueError, ("FastConfig.compile", "regional")),
        (lambda: FastConfig(quantization="int4"), ValueError, ("FastConfig.quantization", "int8-dynamic")),
        (lambda: FastConfig(channels_last=1), ValueError, ("FastConfig.channels_last",)),
        (lambda: FastConfig(cuda_graphs="maybe"), ValueError, ("FastConfig.cuda_graphs",)),
        (lambda: FastConfig(dtype="bfloat16"), ValueError, ("FastConfig.dtype",)),
        (lambda: FastConfig.resolve(3), TypeError, ("fast must be",)),
    ],
)
def test_bad_values_name_the_field(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words)
