"""What of the SDXL family works in the fast classes: one list, for the test and the table.

    python tests/support/family_features.py fastdiff/pipelines/README.md

writes the table between the markers `<!-- features:begin -->` and `<!-- features:end -->`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image

import fastdiff

from .embedded import draw
from .ip_adapters import image_embeds, make_ip_adapter
from .loras import write_lora
from .single_files import write_single_file

BEGIN, END = "<!-- features:begin -->", "<!-- features:end -->"
SIZE = 64
PROMPT = "a red circle on a blue background"
FAST_CLASSES = {
    stock: getattr(fastdiff, f"Fast{stock.__name__}")
    for stock in (
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    )
}
Run = Callable[["Family"], torch.Tensor]


class Family:
    """Makes pipelines of one kind, stock or fast, so that a feature is written once and run on both.

    Args:
        fast: a preset or `FastConfig` for fast pipelines, None for stock ones.
    """

    def __init__(self, fast=None):
        self.fast = fast

    def load(self, stock_class: type[DiffusionPipeline] = StableDiffusionXLPipeline, **components):
        """A fresh pipeline in float32 over the embedded checkpoint."""
        make = self._class(stock_class).from_pretrained
        return self._quiet(make, fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32, **components)

    def load_file(self, path: Path):
        """A pipeline from one file."""
        make = self._class(StableDiffusionXLPipeline).from_single_file
        return self._quiet(make, str(path), config=fastdiff.EMBEDDED_CHECKPOINT, torch_dtype=torch.float32)

    def switch(self, pipe, stock_class: type[DiffusionPipeline] = StableDiffusionXLPipeline, **components):
        """`from_pipe`."""
        return self._quiet(self._class(stock_class).from_pipe, pipe, **components)

    def build(self, stock_class: type[DiffusionPipeline], **components):
        """The constructor."""
        return self._quiet(self._class(stock_class), **components)

    def _class(self, stock_class: type[DiffusionPipeline]):
        return stock_class if self.fast is None else FAST_CLASSES[stock_class]

    def _quiet(self, make, *args, **kwargs):
        pipe = make(*args, **kwargs) if self.fast is None else make(*args, fast=self.fast, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(frozen=True)
class Feature:
    """A feature of the family.

    Attributes:
        group: the row group in the table.
        name: what it is.
        run: draws with pipelines of a `Family`.
        raises: the error, as a pattern, with which the fast classes refuse it; None for what works as in stock.
        tolerance: largest difference to stock; more than the default only where the result has 8 bits.
    """

    group: str
    name: str
    run: Run
    raises: str | None = None
    tolerance: float = 1e-4


# Inputs


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    pixels = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy()).resize((size, size))


def mask() -> Image.Image:
    area = Image.new("L", (SIZE, SIZE))
    area.paste(255, (16, 16, 48, 40))
    return area


@torch.no_grad()
def controlnet(pipe_unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet whose output layers are not zero, as they are before training."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe_unet).eval()
    for parameter in [*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()]:
        parameter.normal_(std=0.05)
    return net


def with_controlnets(family: Family, stock_class=StableDiffusionXLControlNetPipeline, count: int = 1):
    base = family.load()
    nets = [controlnet(base.unet, seed) for seed in range(count)]
    return family.switch(base, stock_class, controlnet=nets[0] if count == 1 else nets)


def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    channels = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    return AutoencoderTiny(**channels, **blocks).eval()


def refiner_like(pipe, config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**pipe.unet.config, **config}).eval()


def lora_file(seed: int = 0, **kwargs) -> Path:
    source = StableDiffusionXLPipeline.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32)
    return write_lora(source, Path(tempfile.mkdtemp()), seed, **kwargs)


# Features


def call(family: Family, **kwargs) -> torch.Tensor:
    return draw(family.load(), **kwargs)


def text_to_image(**kwargs) -> Run:
    return lambda family: call(family, **kwargs)


def image_to_image(family: Family, **kwargs) -> torch.Tensor:
    pipe = family.load(StableDiffusionXLImg2ImgPipeline)
    return draw_from(pipe, **{"image": picture(), "strength": 0.6, "num_inference_steps": 5, **kwargs})


def draw_from(pipe, **kwargs) -> torch.Tensor:
    """`draw` for pipelines that take their size from a picture."""
    given = {"prompt": PROMPT, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    images = pipe(**{**given, **kwargs}).images
    return torch.as_tensor(images)


def inpaint(family: Family, **kwargs) -> torch.Tensor:
    pipe = family.load(StableDiffusionXLInpaintPipeline)
    pictures = {"image": picture(), "mask_image": mask(), "height": SIZE, "width": SIZE}
    return draw_from(pipe, **{**pictures, "strength": 0.8, "num_inference_steps": 4, **kwargs})


def inpaint_crop(family: Family) -> torch.Tensor:
    pipe = family.load(StableDiffusionXLInpaintPipeline)
    given = {"image": picture(), "mask_image": mask(), "height": SIZE, "width": SIZE, "padding_mask_crop": 8}
    image = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0), **given).images[0]
    return torch.as_tensor(np.asarray(image) / 255)


def inpaint_nine_channels(family: Family) -> torch.Tensor:
    base = family.load()
    unet = refiner_like(base, {"in_channels": 9})
    pipe = family.switch(base, StableDiffusionXLInpaintPipeline, unet=unet)
    return draw_from(pipe, image=picture(), mask_image=mask(), height=SIZE, width=SIZE, num_inference_steps=3)


def control(count: int = 1, **kwargs) -> Run:
    image = picture(3) if count == 1 else [picture(3 + i) for i in range(count)]
    return lambda family: draw(with_controlnets(family, count=count), image=image, **kwargs)


def control_image_to_image(family: Family) -> torch.Tensor:
    pipe = with_controlnets(family, StableDiffusionXLControlNetImg2ImgPipeline)
    return draw(pipe, image=picture(), control_image=picture(3), strength=0.7, num_inference_steps=4)


def control_inpaint(family: Family) -> torch.Tensor:
    pipe = with_controlnets(family, StableDiffusionXLControlNetInpaintPipeline)
    return draw(pipe, image=picture(), mask_image=mask(), control_image=picture(3), strength=0.7, num_inference_steps=4)


def base_and_refiner(family: Family) -> torch.Tensor:
    base = family.load()
    latents = draw(base, num_inference_steps=6, denoising_end=0.6)
    # As the real refiner: one text encoder, a score in place of the target size.
    text_dim = base.text_encoder_2.config.projection_dim
    unet = refiner_like(
        base,
        {
            "cross_attention_dim": base.text_encoder_2.config.hidden_size,
            "projection_class_embeddings_input_dim": text_dim + 5 * base.unet.config.addition_time_embed_dim,
        },
    )
    names = ("vae", "scheduler", "text_encoder_2", "tokenizer_2")
    parts = {name: getattr(base, name) for name in names}
    options = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True, "add_watermarker": False}
    refiner = family.build(StableDiffusionXLImg2ImgPipeline, unet=unet, **parts, **options)
    return draw_from(refiner, image=latents, num_inference_steps=6, denoising_start=0.6)


def from_stock_pipe(change: Callable[[StableDiffusionXLPipeline], dict | None]) -> Run:
    def run(family: Family) -> torch.Tensor:
        source = Family().load()
        kwargs = change(source) or {}
        if family.fast is not None:
            source = family.switch(source)
        return draw(source, **kwargs)

    return run


def load_ip_adapter(pipe) -> dict:
    pipe.load_ip_adapter(make_ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return {"ip_adapter_image_embeds": image_embeds()}


def lcm(pipe) -> dict:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return {"guidance_scale": 1.0, "num_inference_steps": 4}


def with_tiny_vae(pipe) -> dict:
    pipe.vae = tiny_vae()
    return {"output_type": "pt"}


def changed(change: Callable, **kwargs) -> Run:
    def run(family: Family) -> torch.Tensor:
        pipe = family.load()
        return draw(pipe, **{**kwargs, **(change(pipe) or {})})

    return run


def single_file(family: Family) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = write_single_file(Family().load(), Path(folder) / "model.safetensors")
        return draw(family.load_file(path))


def embeddings(family: Family) -> torch.Tensor:
    pipe = family.load()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipe.encode_prompt(PROMPT), strict=True))
    # Weighting: the fifth token counts half again as much.
    embeds["prompt_embeds"][:, 5] *= 1.5
    return draw(pipe, prompt=None, **embeds)


def scheduler(scheduler_class, **kwargs) -> Run:
    def change(pipe) -> None:
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, clip_sample=False)

    return changed(change, **{"num_inference_steps": 4, **kwargs})


def lora(pipe) -> None:
    pipe.load_lora_weights(lora_file(text=True), adapter_name="style")


def two_loras(pipe) -> None:
    for name, seed in (("first", 0), ("second", 10)):
        pipe.load_lora_weights(lora_file(seed), adapter_name=name)
    pipe.set_adapters(["first", "second"], [0.7, 0.4])


def fused_lora(pipe) -> None:
    lora(pipe)
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()


def unloaded_lora(pipe) -> None:
    lora(pipe)
    draw(pipe)
    pipe.unload_lora_weights()


def textual_inversion(pipe) -> dict:
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        width = encoder.get_input_embeddings().weight.shape[1]
        vector = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        pipe.load_textual_inversion(vector, token="<thing>", text_encoder=encoder, tokenizer=tokenizer)
    return {"prompt": "a <thing> on a blue background"}


def changes_prompt_midway(family: Family) -> torch.Tensor:
    pipe = family.load()
    other = pipe.encode_prompt("a green square")[0]

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            tensors["prompt_embeds"] = torch.cat([tensors["prompt_embeds"].chunk(2)[0], other])
        elif step == 2:
            tensors["prompt_embeds"] *= 0.9
        return tensors

    names = ["latents", "prompt_embeds"]
    return draw(pipe, num_inference_steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


def dynamic_guidance(family: Family) -> torch.Tensor:
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors = {name: tensor.chunk(2)[-1] for name, tensor in tensors.items() if name != "latents"}
        return tensors

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    return call(family, num_inference_steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


def interrupted(family: Family) -> torch.Tensor:
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    return call(family, num_inference_steps=4, callback_on_step_end=callback)


def output_types(family: Family) -> torch.Tensor:
    pipe = family.load()
    outputs = [torch.as_tensor(draw(pipe, output_type=kind)).flatten() for kind in ("np", "pt", "latent")]
    picture = np.asarray(draw(pipe, output_type="pil")[0], dtype=np.float32) / 255
    # A value may round to the next of 256 steps: this far apart, it would have rounded the other way in float.
    outputs.append(torch.as_tensor(np.abs(picture.flatten() - outputs[0].numpy()) > 0.6 / 255).float())
    generator = torch.Generator().manual_seed(0)
    (tensor,) = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="pt", return_dict=False)
    return torch.cat([*outputs, tensor.flatten()])


def own_latents_and_generators(family: Family) -> torch.Tensor:
    pipe = family.load()
    latents = torch.randn(2, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    own = draw(pipe, prompt=[PROMPT] * 2, latents=latents)
    return torch.cat([own, draw(pipe, prompt=[PROMPT] * 2, generator=generators)])


def from_pag_pipe(family: Family) -> torch.Tensor:
    source = StableDiffusionXLPAGPipeline.from_pretrained(
        fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32, pag_applied_layers=["mid"]
    )
    return draw(family.switch(source), num_inference_steps=2)


def model_offload(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    modules = [m for model in pipe.components.values() if isinstance(model, torch.nn.Module) for m in model.modules()]
    for hook in (getattr(module, "_hf_hook", None) for module in modules):
        for part in getattr(hook, "hooks", [hook]):
            # diffusers says "cpu:0", to which torch copies parameters as plain tensors, which accelerate refuses.
            if hasattr(part, "execution_device"):
                part.execution_device = torch.device("cpu")


def group_offload(pipe) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


FEATURES = [
    Feature("Pipelines", "text-to-image", text_to_image()),
    Feature("Pipelines", "image-to-image", image_to_image),
    Feature("Pipelines", "inpainting", inpaint),
    Feature("Pipelines", "inpainting with a 9-channel UNet", inpaint_nine_channels),
    Feature("Pipelines", "inpainting, `padding_mask_crop`", inpaint_crop, tolerance=1.1 / 255),
    Feature("Pipelines", "base and refiner (`denoising_end`, `denoising_start`)", base_and_refiner),
    Feature("ControlNet", "one ControlNet", control()),
    Feature("ControlNet", "several ControlNets", control(2, controlnet_conditioning_scale=[0.7, 0.4])),
    Feature(
        "ControlNet",
        "`control_guidance_start`, `control_guidance_end`",
        control(control_guidance_start=0.2, control_guidance_end=0.6, num_inference_steps=6),
    ),
    Feature("ControlNet", "`guess_mode`", control(guess_mode=True, guidance_scale=3.0)),
    Feature("ControlNet", "image-to-image", control_image_to_image),
    Feature("ControlNet", "inpainting", control_inpaint),
    Feature("Loading", "`from_single_file`, original layout", single_file),
    Feature("Loading", "`from_pipe` of a stock pipeline", from_stock_pipe(lambda pipe: None)),
    Feature("Loading", "`from_pipe` with a LoRA loaded", from_stock_pipe(lora)),
    Feature("Loading", "`from_pipe` with an IP-Adapter loaded", from_stock_pipe(load_ip_adapter)),
    Feature("Loading", "`from_pipe` with an LCM, Turbo or Lightning scheduler", from_stock_pipe(lcm)),
    Feature("Loading", "`from_pipe` with a tiny VAE", from_stock_pipe(with_tiny_vae)),
    Feature("Loading", "components assigned later (`pipe.scheduler = ...`)", changed(lcm)),
    Feature("Prompts", "second and negative prompts", text_to_image(prompt_2="a circle", negative_prompt="blurry")),
    Feature(
        "Prompts",
        "lists of prompts, `num_images_per_prompt`",
        text_to_image(prompt=[PROMPT, "a star"], num_images_per_prompt=2),
    ),
    Feature("Prompts", "weighting by `prompt_embeds`", embeddings),
    Feature("Prompts", "`clip_skip`", text_to_image(clip_skip=1)),
    Feature("Prompts", "textual inversion", changed(textual_inversion)),
    Feature(
        "Conditioning",
        "sizes and crops, also negative",
        text_to_image(
            original_size=(96, 96),
            crops_coords_top_left=(8, 8),
            target_size=(64, 64),
            negative_original_size=(32, 32),
            negative_target_size=(64, 64),
        ),
    ),
    Feature("Conditioning", "sizes that are no multiple of 32", text_to_image(height=72, width=104)),
    Feature("Guidance", "no guidance", text_to_image(guidance_scale=1.0)),
    Feature("Guidance", "`guidance_rescale`", text_to_image(guidance_rescale=0.7)),
    Feature("Guidance", "guidance switched off midway by a callback", dynamic_guidance),
    Feature("Guidance", "perturbed-attention guidance (PAG pipelines)", from_pag_pipe, raises="Perturbed-attention"),
    Feature("Schedulers", "Euler ancestral", scheduler(EulerAncestralDiscreteScheduler)),
    Feature("Schedulers", "DPM++ multistep", scheduler(DPMSolverMultistepScheduler)),
    Feature("Schedulers", "UniPC", scheduler(UniPCMultistepScheduler)),
    Feature("Schedulers", "DDIM, with `eta`", scheduler(DDIMScheduler, eta=0.5)),
    Feature("Schedulers", "Heun", scheduler(HeunDiscreteScheduler)),
    Feature("Schedulers", "TCD", scheduler(TCDScheduler, eta=0.3, guidance_scale=1.0)),
    Feature("Schedulers", "own `timesteps`", text_to_image(num_inference_steps=None, timesteps=[900, 500, 100])),
    Feature("Schedulers", "own `sigmas`", text_to_image(num_inference_steps=None, sigmas=[14.0, 3.0, 0.5])),
    Feature("Adapters", "LoRA", changed(lora)),
    Feature("Adapters", "LoRA, `cross_attention_kwargs` scale", changed(lora, cross_attention_kwargs={"scale": 0.4})),
    Feature("Adapters", "several LoRAs, `set_adapters`", changed(two_loras)),
    Feature("Adapters", "LoRA, fused", changed(fused_lora)),
    Feature("Adapters", "LoRA, unloaded", changed(unloaded_lora)),
    Feature("Adapters", "IP-Adapter", changed(load_ip_adapter)),
    Feature("Memory", "`enable_model_cpu_offload`", changed(model_offload)),
    Feature("Memory", "`enable_sequential_cpu_offload`", changed(sequential_offload)),
    Feature("Memory", "`enable_group_offload`", changed(group_offload)),
    Feature("Memory", "VAE tiling", changed(lambda p: p.vae.enable_tiling(), height=192, width=192, output_type="pt")),
    Feature("Memory", "VAE slicing", changed(lambda p: p.vae.enable_slicing(), prompt=[PROMPT] * 2, output_type="pt")),
    Feature("Memory", "attention slicing", changed(lambda pipe: pipe.enable_attention_slicing())),
    Feature("Calls", "`callback_on_step_end` that changes the prompt", changes_prompt_midway),
    Feature("Calls", "`interrupt`", interrupted),
    Feature("Calls", "`output_type` of all kinds, `return_dict=False`", output_types),
    Feature("Calls", "own `latents`, list of generators", own_latents_and_generators),
    Feature("Calls", "FreeU", changed(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4))),
]


def markdown() -> str:
    """The table of the list."""
    rows = ["| | Feature | Fast classes |", "|---|---|---|"]
    group = None
    for feature in FEATURES:
        works = "as in stock" if feature.raises is None else f"refused with an error that names `{feature.raises}`"
        rows.append(f"| {feature.group if feature.group != group else ''} | {feature.name} | {works} |")
        group = feature.group
    return "\n".join(rows)


def write_table(readme: Path) -> None:
    """Replace what is between the markers in a file."""
    head, _, rest = readme.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{BEGIN}\n{markdown()}\n{END}{tail}")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
