"""A folder that fastdiff has saved draws in stock diffusers without an argument."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.embedded import draw, load_fast, load_stock

import fastdiff
from fastdiff import FastStableDiffusionXLPipeline


def loads_and_draws(folder) -> torch.Tensor:
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return draw(stock)


def test_the_embedded_checkpoint_draws_in_stock_as_it_is(stock):
    assert torch.equal(loads_and_draws(fastdiff.EMBEDDED_CHECKPOINT), draw(stock))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_saved_in_16_bits_draws_in_stock_as_it_is(dtype, tmp_path, assert_close):
    fast = FastStableDiffusionXLPipeline.from_pretrained("embedded", dtype=dtype)
    fast.save_pretrained(tmp_path)
    drawn = loads_and_draws(tmp_path)
    assert_close(drawn, draw(load_stock()), tolerance=0.2)
    again = FastStableDiffusionXLPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert {again.unet.dtype, again.text_encoder.dtype, again.vae.dtype} == {dtype}


def test_off_saves_as_stock_does(tmp_path):
    pipe = FastStableDiffusionXLPipeline.from_pretrained("embedded", fast="off", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    assert '"dtype": "bfloat16"' in (tmp_path / "text_encoder" / "config.json").read_text()


def test_mixed_dtypes_are_named():
    mixed = load_stock()
    mixed.text_encoder_2.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="unet float32, text_encoder float32, text_encoder_2 bfloat16"):
        FastStableDiffusionXLPipeline.from_pipe(mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastStableDiffusionXLPipeline.from_pipe(mixed, torch_dtype=torch.float32)
        FastStableDiffusionXLPipeline.from_pipe(load_fast())
