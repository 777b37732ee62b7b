"""Every snippet of diffusers' guide "Accelerate inference", in its order, run on the stock class and on the fast one.

The fast one gets the snippet with the class's name changed, and nothing else: as it stands, and after a first picture;
each followed by a call of another size and another batch. Both read a tiny checkpoint, and "cuda" as the device at
hand.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from support.tiny import save_tiny
from torch.nn.attention import sdpa_kernel

import fastdiff

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKPOINT = "stabilityai/stable-diffusion-xl-base-1.0"
PICTURE = """
prompt = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
image = pipeline(prompt, num_inference_steps=30).images[0]
"""


def load(dtype: str) -> str:
    return f"""
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "{CHECKPOINT}", torch_dtype=torch.{dtype}
).to("cuda")
"""


COMPILER_TAGS = """
torch._inductor.config.conv_1x1_as_mm = True
torch._inductor.config.coordinate_descent_tuning = True
torch._inductor.config.epilogue_fusion = False
torch._inductor.config.coordinate_descent_check_all_directions = True
"""

# Heading, what comes before the pipeline is loaded, its dtype, what is done to it, and whether a picture is drawn in a
# context. What a snippet leaves to the text around it (loading, a picture) is as in the snippets before.
ATTENTION = f"torch.nn.attention.SDPBackend.{'EFFICIENT_ATTENTION' if DEVICE == 'cuda' else 'MATH'}"
GUIDE = {
    "Model data type: bfloat16": ("", "bfloat16", "", None),
    "Model data type: float16": ("", "float16", "", None),
    "Model data type: TensorFloat-32": ("torch.backends.cuda.matmul.allow_tf32 = True", "bfloat16", "", None),
    "Scaled dot product attention": ("", "bfloat16", "", ATTENTION),
    "torch.compile": (
        COMPILER_TAGS,
        "float32",
        """
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(
            pipeline.unet, mode="max-autotune", fullgraph=True
        )
        pipeline.vae.decode = torch.compile(
            pipeline.vae.decode,
            mode="max-autotune",
            fullgraph=True
        )
        """,
        None,
    ),
    "Dynamic shape compilation": (
        "torch.fx.experimental._config.use_duck_shape = False",
        "float32",
        """
        pipeline.unet = torch.compile(
            pipeline.unet, fullgraph=True, dynamic=True
        )
        """,
        None,
    ),
    "Regional compilation": ("", "float32", "pipeline.unet.compile_repeated_blocks(fullgraph=True)", None),
    "Regional compilation: _repeated_blocks of one's own": (
        "",
        "float32",
        """
        class MyUNet(type(pipeline.unet)):
            _repeated_blocks = ("Transformer2DModel",)

        pipeline.unet.__class__ = MyUNet
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
        """,
        None,
    ),
    "Regional compilation: accelerate": (
        "from accelerate.utils import compile_regions",
        "float32",
        """
        pipeline.unet = compile_regions(pipeline.unet, mode="reduce-overhead", fullgraph=True)
        """,
        None,
    ),
    "Graph breaks": (
        "",
        "float32",
        """
        latents, timestep = torch.ones(1, 4, 8, 8, device="cuda"), torch.tensor(10)
        prompt, _, pooled, _ = pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6, device="cuda")}
        unet = torch.compile(pipeline.unet, fullgraph=True)
        with torch.no_grad():
            before = pipeline.unet(
                latents, timestep=timestep, encoder_hidden_states=prompt, added_cond_kwargs=added
            ).sample
            latents = unet(
                latents, timestep=timestep, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False
            )[0]
        assert (latents - before).abs().max() < 1e-4
        """,
        None,
    ),
    # `apply_dynamic_quant` has left torchao; this is what it did, by torchao's function of today.
    "Dynamic quantization": (
        COMPILER_TAGS
        + """
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

def dynamic_quant_filter_fn(module, name):
    return isinstance(module, torch.nn.Linear) and module.in_features >= 128
""",
        "float32",
        """
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        quantize_(pipeline.unet, config, filter_fn=dynamic_quant_filter_fn)
        quantize_(pipeline.vae, config, filter_fn=dynamic_quant_filter_fn)
        """,
        None,
    ),
    "Fused projection matrices": ("", "float32", "pipeline.fuse_qkv_projections()", None),
    "Fused projection matrices: and back": (
        "",
        "float32",
        """
        pipeline.fuse_qkv_projections()
        pipeline.unfuse_qkv_projections()
        """,
        None,
    ),
}
PLAIN = "nothing changed"
SNIPPETS = {**GUIDE, PLAIN: ("", "float32", "", None)}
# Of 8-bit numbers: the largest difference of a picture in float32, the mean one in half precisions.
LARGEST, MEAN = 1, 4.0


@functools.cache
def tiny_checkpoint() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return save_tiny(Path(folder.name))


class Run:
    """One snippet on one class, and the pictures that it draws."""

    def __init__(self, heading: str, fast: bool, first_picture: bool):
        before, dtype, after, context = SNIPPETS[heading]
        self.pictures: list[np.ndarray] = []
        self.names: dict[str, object] = {"torch": torch}
        self.context = context
        self.fast = fast
        self.execute(textwrap.dedent(before) + load(dtype))
        self.pipe: DiffusionPipeline = self.names["pipeline"]
        self.pipe.set_progress_bar_config(disable=True)
        if first_picture:
            self.draw()
        self.execute(textwrap.dedent(after))

    def execute(self, code: str) -> None:
        code = code.replace('"cuda"', repr(DEVICE)).replace(f'"{CHECKPOINT}"', repr(str(tiny_checkpoint())))
        if self.fast:
            code = code.replace("from diffusers import Stable", "from fastdiff import FastStable")
            code = code.replace("= StableDiffusionXLPipeline.", "= FastStableDiffusionXLPipeline.")
        exec(code, self.names)

    def draw(self, **call) -> None:
        torch.manual_seed(0)
        with sdpa_kernel(eval(self.context)) if self.context else nullcontext():
            if call:
                images = self.pipe("a red circle", num_inference_steps=2, **call).images
            else:
                self.execute(PICTURE.replace("=30", "=4"))
                images = [self.names["image"]]
        self.pictures += [np.asarray(image, dtype=np.float32) for image in images]


@pytest.fixture(autouse=True)
def settings_of_torch(fresh_compiler):
    """Snippets write torch's global settings; graphs are traced, and run as they were traced."""
    tf32, duck = torch.backends.cuda.matmul.allow_tf32, torch.fx.experimental._config.use_duck_shape
    inductor = torch._inductor.config.save_config()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
    torch._inductor.config.load_config(inductor)
    torch.backends.cuda.matmul.allow_tf32, torch.fx.experimental._config.use_duck_shape = tf32, duck


@functools.cache
def stock_pictures(heading: str) -> list[np.ndarray] | str:
    """What stock draws, in every case: it keeps nothing from one picture to the next. Or what it raises."""
    try:
        return pictures(heading, fast=False)
    except Exception as error:
        return f"stock raises {type(error).__name__}: {str(error)[:120]}"


def pictures(heading: str, fast: bool, first_picture: bool = False) -> list[np.ndarray]:
    torch.compiler.reset()
    run = Run(heading, fast, first_picture)
    run.pictures.clear()
    run.draw()
    run.draw(height=96, width=64, num_images_per_prompt=2)
    return run.pictures


@pytest.mark.parametrize("when", ["as it stands", "after a first picture"])
@pytest.mark.parametrize("heading", GUIDE)
def test_guide(heading, when):
    expected = stock_pictures(heading)
    if isinstance(expected, str):
        pytest.skip(expected)
    actual = pictures(heading, fast=True, first_picture=when != "as it stands")
    assert len(actual) == len(expected) == 3
    for mine, theirs, plain in zip(actual, expected, stock_pictures(PLAIN), strict=True):
        difference = np.abs(mine - theirs)
        assert mine.shape == theirs.shape and theirs.std() > 1
        if heading == "Dynamic quantization":
            # What rounds otherwise may come to another 8-bit number: a part of what quantizing itself costs.
            assert difference.mean() < 0.5 * np.abs(theirs - plain).mean()
        else:
            assert difference.mean() < MEAN if GUIDE[heading][1] != "float32" else difference.max() <= LARGEST


def test_a_model_class_of_ones_own_names_its_blocks():
    class MyUNet(fastdiff.FastUNet2DConditionModel):
        _repeated_blocks = ("Transformer2DModel",)

    unet = MyUNet.from_config(MyUNet.load_config(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet"))
    unet.compile_repeated_blocks(fullgraph=True)
    compiled = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl is not None}
    assert compiled == {"Transformer2DModel"}
