"""A picture is scaled, rounded and cast where it is, so that one byte a value is copied to the host."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from legs import only_patched

pytestmark = only_patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_comes_to_the_host_has_eight_bits(dtype, monkeypatch):
    processor = VaeImageProcessor()
    sample = torch.linspace(-1.1, 1.1, 3 * 64 * 64).reshape(1, 3, 64, 64).to(dtype)
    expected = (processor.postprocess(sample, output_type="np")[0] * 255).round().astype("uint8")

    arrived, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: arrived.append(tensor.dtype) or cpu(tensor))
    picture = processor.postprocess(sample, output_type="pil")[0]
    assert arrived == [torch.uint8]
    assert np.array_equal(np.asarray(picture), expected)
