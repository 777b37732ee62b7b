"""Compiled regions: how much they cover, one set of graphs for whatever is asked of them, and nothing left behind."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLControlNetPipeline, UNet2DConditionModel
from support.embedded import draw, load_fast, load_stock
from support.family_features import controlnet, picture
from support.loras import write_lora
from torch._dynamo.utils import counters

from fastdiff import FastConfig, FastStableDiffusionXLControlNetPipeline
from fastdiff.bench.flops import region_share
from fastdiff.bench.sdxl_random import UNET_CONFIG, VAE_CONFIG
from fastdiff.compiler.compilation import (
    apply_compilation,
    inductor_options,
    region_kinds,
    repeated_blocks,
    undo_compilation,
)
from fastdiff.models.controlnet import FastControlNetModel
from fastdiff.models.unet import FastUNet2DConditionModel
from fastdiff.models.vae import FastAutoencoderKL

pytestmark = pytest.mark.usefixtures("fresh_compiler")

COMPILED = FastConfig.preset("exact", compile="regional")

# One picture and two without guidance: one sample and several for the UNet, and for the VAE.
EVERY_CALL = {"batch_sizes": [1, 2], "guidance_scale": 1.0}

# Sizes that are square, portrait, landscape, and such that some level of the UNet has an odd height or width. In
# float32, on one thread of a CPU, torch has another convolution for up to 20480 numbers, and the graph has to know
# which: these sizes are all on one side of it.
SIZES = ((64, 64), (80, 64), (64, 80), (72, 64), (56, 88), (88, 56))


@pytest.fixture
def traced_only():
    """Run graphs as they were traced, without generating code.

    What recompiles is decided by guards, which come from tracing, before any backend sees the graph.
    """
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def embeddings(tokens: int, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """What replaces a prompt in a call."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"prompt_embeds": (1, tokens, 192), "pooled_prompt_embeds": (1, 128)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return {"prompt": None, **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}}


def test_matrix_of_calls_after_one_warmup_recompiles_nothing(stock, assert_close, traced_only):
    fast = load_fast(COMPILED)
    fast.warmup(sizes=[(64, 64)], **EVERY_CALL)
    made = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Every pair of a size, a batch, a guidance and a length of prompt, not every combination of the four.
        for size, batch in itertools.product(range(len(SIZES)), range(3)):
            width, height = SIZES[size]
            call = {
                "width": width,
                "height": height,
                "num_images_per_prompt": 1 + batch,
                "guidance_scale": (5.0, 1.0)[(size + batch) % 2],
                "num_inference_steps": 1 + size % 2,
                "output_type": "pt",
                **embeddings((77, 154, 231)[(size + batch) % 3]),
            }
            assert_close(draw(fast, **call), draw(stock, **call))
    assert graphs() == made
    assert not counters["graph_break"]


def test_larger_sizes_recompile_nothing_either(stock, assert_close, traced_only):
    fast = load_fast(COMPILED)
    draw(fast, width=160, height=160, num_inference_steps=1, output_type="pt")
    made = graphs()
    for width, height in ((256, 160), (152, 248)):
        call = {"width": width, "height": height, "num_inference_steps": 1, "output_type": "pt"}
        assert_close(draw(fast, **call), draw(stock, **call))
    assert graphs() == made


def test_generated_code_serves_other_calls_and_says_nothing(stock, assert_close, capfd):
    fast = load_fast(COMPILED)
    capfd.readouterr()
    fast.warmup(sizes=[(64, 64)], **EVERY_CALL)
    out, err = capfd.readouterr()
    # PyTorch's own word, of a build for CUDA where there is nvcc and no GPU.
    said = [line for line in err.splitlines() if "No CUDA runtime is found" not in line]
    assert (out, said) == ("", [])
    made = graphs()
    assert made < len(repeated_blocks(fast.unet)) + len(repeated_blocks(fast.vae))
    calls = (
        {},
        {"width": 80, "num_images_per_prompt": 2},
        {"height": 72, "guidance_scale": 1.0},
        {"width": 88, "height": 56, "num_images_per_prompt": 3, "guidance_scale": 1.0, **embeddings(154)},
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call in calls:
            assert_close(draw(fast, output_type="pt", **call), draw(stock, output_type="pt", **call))
    assert graphs() == made
    assert not counters["graph_break"]
    assert "regional" in next(step.reason for step in fast.plan if step.name == "compile")


def test_calls_make_the_graphs_that_they_need_and_no_others(traced_only):
    fast = load_fast(COMPILED)
    kinds = region_kinds(fast.unet)
    # Beyond its limit of graphs for one function the compiler raises; adapters would soon get there.
    with torch._dynamo.config.patch(recompile_limit=1):
        draw(fast, num_inference_steps=1)
        assert graphs() == kinds
        draw(fast, num_inference_steps=1, guidance_scale=1.0)
    assert graphs() == 2 * kinds


def test_warmup_makes_the_graphs_for_what_it_is_asked(traced_only):
    fast = load_fast(COMPILED)
    denoiser, decoder = region_kinds(fast.unet), region_kinds(fast.vae, fast.vae.decoder)
    # So large that torch's small convolution (see SIZES) is nowhere in the decoder.
    fast.warmup(sizes=[(160, 160), (176, 160)])
    assert graphs() == denoiser + decoder
    fast.warmup(sizes=[(160, 160)], batch_sizes=[2])
    assert graphs() == denoiser + 2 * decoder


def test_full_graph_equals_stock(stock, assert_close):
    fast = load_fast(FastConfig.preset("exact", compile="full"))
    assert_close(draw(fast), draw(stock))
    assert not counters["graph_break"]
    assert graphs() == 1


def test_controlnet_that_ends_early_recompiles_nothing(assert_close, traced_only):
    base = load_stock()
    stock = StableDiffusionXLControlNetPipeline.from_pipe(base, controlnet=controlnet(base.unet))
    fast = FastStableDiffusionXLControlNetPipeline.from_pipe(stock, fast=COMPILED)
    for pipe in (stock, fast):
        pipe.set_progress_bar_config(disable=True)
    fast.vae._repeated_blocks = []
    fast.warmup(sizes=[(64, 64)], **EVERY_CALL)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call in (
            {"control_guidance_end": 0.5},
            {"control_guidance_start": 0.5, "width": 80, "guidance_scale": 1.0},
            {"controlnet_conditioning_scale": 0.3, "guess_mode": True, "num_images_per_prompt": 2},
        ):
            assert_close(draw(fast, image=picture(), **call), draw(stock, image=picture(), **call))


def test_scale_of_a_lora_recompiles_nothing(tmp_path, assert_close, traced_only):
    file = write_lora(load_stock(), tmp_path, seed=1)
    stock, fast = load_stock(), load_fast(COMPILED)
    # The transformer blocks are what a LoRA reaches.
    fast.unet._repeated_blocks, fast.vae._repeated_blocks = ["BasicTransformerBlock"], []
    for pipe in (stock, fast):
        pipe.load_lora_weights(file, adapter_name="style")
    fast.warmup(sizes=[(64, 64)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 0.5, 0.0, 1.3):
            call = {"cross_attention_kwargs": {"scale": scale}}
            assert_close(draw(fast, **call), draw(stock, **call))
        for pipe in (stock, fast):
            pipe.set_adapters("style", 0.3)
        assert_close(draw(fast), draw(stock))


def test_switching_loras_of_one_rank_does_not_recompile(tmp_path, assert_close, traced_only):
    files = [write_lora(load_stock(), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    expected = []
    for file in files:
        stock = load_stock()
        stock.load_lora_weights(file)
        expected.append(draw(stock))
    assert (expected[0] - expected[1]).abs().max() > 1e-2

    fast = load_fast(COMPILED)
    fast.unet._repeated_blocks = ["BasicTransformerBlock"]
    fast.enable_lora_hotswap(target_rank=4)
    fast.load_lora_weights(files[0], adapter_name="style")
    assert_close(draw(fast), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(1, 11):
            fast.load_lora_weights(files[turn % 2], adapter_name="style", hotswap=True)
            assert_close(draw(fast), expected[turn % 2])


def test_regions_cover_the_full_size_models():
    """At least 95 % of the FLOPs, in few graphs; on the meta device, which knows shapes and has no numbers."""
    with torch.device("meta"):
        unet = FastUNet2DConditionModel.from_stock(UNet2DConditionModel(**UNET_CONFIG))
        net = FastControlNetModel.from_stock(ControlNetModel.from_unet(unet, load_weights_from_unet=False))
        vae = FastAutoencoderKL.from_stock(AutoencoderKL(**VAE_CONFIG))
        # It asks for the device's autocast, which meta has none of.
        unet.context_cache.enabled = net.context_cache.enabled = False
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        latents, step, context = torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, 2048)
        image = torch.empty(1, 3, 1024, 1024)
        shares = [
            region_share(unet, lambda: unet(latents, step, context, added_cond_kwargs=added)),
            region_share(vae, lambda: vae.decode(latents[:1])),
            region_share(vae, lambda: vae.encode(image)),
            region_share(net, lambda: net(latents, step, context, image, added_cond_kwargs=added)),
        ]
    assert min(shares[:3]) >= 0.98
    # The rest of a ControlNet is the embedding of its picture.
    assert shares[3] >= 0.95
    parts = (unet, None), (vae, vae.decoder), (net, None)
    kinds = {device: [region_kinds(*part, device) for part in parts] for device in ("cpu", "cuda")}
    assert kinds == {"cpu": [6, 5, 5], "cuda": [18, 8, 9]}
    assert len(repeated_blocks(unet)) == 70 + 17 + 4


def test_regions_cover_the_embedded_models(exact):
    unet, vae = exact.unet, exact.vae
    added = {"text_embeds": torch.zeros(2, 128), "time_ids": torch.zeros(2, 6)}
    inputs = torch.zeros(2, 4, 64, 64), torch.tensor(500), torch.zeros(2, 77, 192)
    assert region_share(unet, lambda: unet(*inputs, added_cond_kwargs=added)) >= 0.95
    assert region_share(vae, lambda: vae.decode(torch.zeros(1, 4, 16, 16))) >= 0.95


def test_compiling_can_be_undone():
    fast = load_fast()
    blocks = repeated_blocks(fast.unet)
    kinds = {type(block).__name__ for block in blocks}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
    assert apply_compilation(fast.unet, "regional") == len(blocks)
    assert all("forward" in block.__dict__ for block in blocks)
    undo_compilation(fast.unet)
    assert not any("forward" in block.__dict__ for block in blocks)
    assert "denoise" not in fast.unet.__dict__


def test_small_models_are_not_compiled_by_default():
    step = next(step for step in load_fast(FastConfig.preset("exact")).plan if step.name == "compile")
    assert not step.applied and "M parameters" in step.reason


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_options_are_known_to_the_compiler(mode):
    recipe = inductor_options("cuda", mode)
    assert recipe["conv_1x1_as_mm"] and recipe["force_layout_optimization"] and not recipe["epilogue_fusion"]
    # Searches of minutes: for a mode whose first call is known to be slow.
    assert ("max_autotune" in recipe) == ("coordinate_descent_tuning" in recipe) == (mode == "full")
    # It refuses an option that it does not have.
    torch.compile(torch.nn.Identity(), options=recipe)
    # Freezing would make constants of weights that merging a LoRA writes to.
    assert "freezing" not in inductor_options("cpu", mode)


def test_progress_names_the_regions_and_counts_down(traced_only):
    fast = load_fast(COMPILED)
    fast.unet._repeated_blocks = ["BasicTransformerBlock", "Downsample2D"]
    fast.vae._repeated_blocks = ["FastAttention"]
    shown = io.StringIO()
    fast.set_progress_bar_config(file=shown, mininterval=0, miniters=1)
    fast.warmup(sizes=[(64, 64)])
    lines = [line for line in re.split(r"[\r\n]", shown.getvalue()) if "Compiling" in line]
    counts = [tuple(map(int, re.search(r"(\d+)/(\d+)", line).groups())) for line in lines]
    unet, decoder = region_kinds(fast.unet), region_kinds(fast.vae, fast.vae.decoder)
    assert {total for _, total in counts} == {unet, unet + decoder}
    assert counts[-1] == (unet + decoder, unet + decoder)
    named = {re.search(r"(\w+ \d+->\d+)\]", line).group(1) for line in lines if "->" in line}
    assert {"BasicTransformerBlock 96->96", "FastAttention 64->192"} <= named
    assert sum(line.count("Compiling") for line in lines) == len(lines), "one bar"

    shown.truncate(0)
    draw(fast, seed=1)
    assert "Compiling" not in shown.getvalue(), "nothing was left to make"


def test_no_progress_is_shown_where_bars_are_disabled(capfd, traced_only):
    fast = load_fast(COMPILED)
    fast.unet._repeated_blocks = ["Downsample2D"]
    capfd.readouterr()
    draw(fast)
    assert graphs() > 0
    assert capfd.readouterr() == ("", "")


def test_globals_of_torch_are_left_alone():
    """In a process of its own: after import, construction and a call that compiles with each mode."""
    script = Path(__file__).parents[1] / "support" / "torch_globals.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["import", "construction", "regional", "full"]
