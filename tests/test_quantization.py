"""Which scheme on which device, which layers, and how far results move."""

from __future__ import annotations

import pytest
import torch
from conftest import draw, load_fast
from diffusers import UNet2DConditionModel

from fastdiff import FastConfig, FastUNet2DConditionModel
from fastdiff.quantization import apply_quantization, choose_quantization, is_quantizable

CPU = torch.device("cpu")


def test_on_cpu_nothing_is_quantized_by_default_and_the_plan_says_why():
    choice = choose_quantization("auto", CPU, torch.bfloat16)
    assert choice.scheme is None and "cpu" in choice.reason
    step = next(step for step in load_fast("balanced").plan if step.name == "quantize")
    assert not step.applied and not step.lossless and step.reason == choice.reason


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-weight-only"])
def test_a_scheme_that_the_device_cannot_run_is_refused_before_the_loop(scheme):
    fast = load_fast(FastConfig.preset("balanced", quantization=scheme))
    with pytest.raises(ValueError, match=rf"{scheme}.*8\.9"):
        draw(fast)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        choose_quantization("int8-weight-only", CPU, torch.float16)


@pytest.fixture(scope="module")
def wide_unet() -> FastUNet2DConditionModel:
    """SDXL's structure, wide enough that its layers are worth quantizing."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 512), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=512,
        attention_head_dim=(1, 8), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=256,
    )
    return FastUNet2DConditionModel.from_stock(unet.eval().requires_grad_(False))


def test_layers_are_chosen_by_role_and_size(wide_unet):
    wide_unet.fuse_qkv_projections()
    names = {name for name, module in wide_unet.named_modules() if is_quantizable(name, module)}
    roles = {name.split(".transformer_blocks.")[1].partition(".")[2] for name in names}
    assert roles == {"attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}


def test_int8_weights_take_half_of_the_memory_and_move_the_result_little(wide_unet):
    inputs = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(1, 77, 512),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)},
    }
    wide_unet.fuse_qkv_projections()
    chosen = [module for name, module in wide_unet.named_modules() if is_quantizable(name, module)]
    before = wide_unet(**inputs).sample
    taken, left = apply_quantization(wide_unet, "int8-weight-only")
    assert taken == len(chosen) and left > 0
    assert all(type(module.weight.data) is not torch.Tensor for module in chosen)
    after = wide_unet(**inputs).sample
    error = ((after - before).norm() / before.norm()).item()
    assert 0 < error < 0.02
