"""Pictures as upstream makes them, bit for bit, though they become 8-bit numbers before they leave the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from support.sync_recorder import SyncRecorder

from fastdiff.pipelines.postprocess import FastImageProcessor, to_pixels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decoded(dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    """What a VAE may give: noise beyond [-1, 1], and values halfway between two 8-bit numbers."""
    image = torch.randn(batch, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    halves = (torch.arange(0, 256) + 0.5) / 255 * 2 - 1
    image[0].view(-1)[: 256 * 3] = torch.cat([halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)])
    return image.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_are_those_of_upstream(dtype):
    images = VaeImageProcessor.denormalize(decoded(dtype))
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = to_pixels(images.contiguous(memory_format=layout))
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        assert [Image.fromarray(p).tobytes() for p in pixels.numpy()] == [picture.tobytes() for picture in expected]


def test_every_value_rounds_as_upstream():
    # All bfloat16 numbers in [0, 1], and the float32 numbers around each half.
    sixteen = torch.arange(0x3F81, dtype=torch.int16).view(torch.bfloat16)
    halves = (torch.arange(256) + 0.5) / 255
    near = torch.stack([halves, halves.nextafter(torch.zeros(())), halves.nextafter(torch.ones(()))]).clamp(0, 1)
    for values in (sixteen, near.flatten()):
        images = values[None, None, None].expand(1, 3, 1, -1)
        expected = np.asarray(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))[0])
        assert np.array_equal(to_pixels(images)[0].numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_device_as_upstream_and_one_wait(dtype):
    processor, image = FastImageProcessor(), decoded(dtype)
    expected = VaeImageProcessor().postprocess(image)
    assert [p.tobytes() for p in processor.postprocess(image)] == [p.tobytes() for p in expected]
    with SyncRecorder() as recorder:
        pictures = processor.postprocess(recorder.on_device(image))
    assert [event.name for event in recorder.waits()] == ["synchronize"]
    assert len(recorder.events) == 2  # the copy, and the wait for it
    assert [(p.mode, p.size, p.tobytes()) for p in pictures] == [(p.mode, p.size, p.tobytes()) for p in expected]


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"output_type": "np"}),
        ({}, {"output_type": "pt"}),
        ({"do_normalize": False}, {"output_type": "pil"}),
        ({}, {"output_type": "pil", "do_denormalize": [True, False]}),
    ],
)
def test_all_else_is_upstreams(options, call):
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = VaeImageProcessor(**options).postprocess(image, **call)
    with SyncRecorder() as recorder:
        made = FastImageProcessor(**options).postprocess(recorder.on_device(image), **call)
        made = made.cpu() if isinstance(made, torch.Tensor) else made
    assert np.array_equal(np.asarray(made), np.asarray(expected))
    assert "synchronize" not in [event.name for event in recorder.events]
