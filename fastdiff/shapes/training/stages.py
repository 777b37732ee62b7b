"""What each stage of the training minimises. `train.py` runs them in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..captions import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, caption, sample_scene
from .architecture import IMAGE_SIZE, TEXT_WIDTHS
from .render import collage, render

CAPTION_DROPOUT = 0.1
"""Share of captions replaced by zeros, which is what SDXL gives an absent negative prompt."""
MIN_SNR_GAMMA = 5.0
KL_WEIGHT = 3e-4


class AutoencoderStage:
    """Reconstruct: L1 and L2 on pixels, L1 on their gradients, and a little KL.

    Most steps see collages a quarter of the size, full of edges and colours; the last ones see the scenes.
    """

    name, learning_rate, batch = "autoencoder", 2e-3, 16

    def __init__(self, pipeline: StableDiffusionXLPipeline, steps: int, seed: int, device: torch.device) -> None:
        self.vae, self.steps, self.seed, self.device = pipeline.vae, steps, seed, device

    def modules(self) -> list[nn.Module]:
        return [self.vae]

    def loss(self, step: int) -> Tensor:
        rng = random.Random(f"{self.name}-{self.seed}-{step}")
        torch.manual_seed(rng.getrandbits(48))
        if step < 0.8 * self.steps:
            drawings = [collage(rng, IMAGE_SIZE // 2) for _ in range(self.batch)]
        else:
            drawings = [render(sample_scene(rng), rng) for _ in range(self.batch // 2)]
        pictures = torch.stack([_as_tensor(drawing) for drawing in drawings]).to(self.device)
        posterior = self.vae.encode(pictures).latent_dist
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        error = self.vae.decode(posterior.sample()).sample.float() - pictures
        return _picture_error(error) + KL_WEIGHT * kl


class TextStage:
    """A head start for the text encoders: say each attribute of the scene from the two text embeddings."""

    name, learning_rate, batch = "text", 1e-3, 64

    def __init__(self, pipeline: StableDiffusionXLPipeline, steps: int, seed: int, device: torch.device) -> None:
        self.pipeline, self.steps, self.seed, self.device = pipeline, steps, seed, device
        classes = sum(len(choices) + 1 for choices in _attribute_choices())
        torch.manual_seed(seed)
        self.heads = nn.ModuleList(nn.Linear(n, classes) for n in (sum(TEXT_WIDTHS), TEXT_WIDTHS[1])).to(device)

    def modules(self) -> list[nn.Module]:
        return [self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.heads]

    def loss(self, step: int) -> Tensor:
        rng = random.Random(f"{self.name}-{self.seed}-{step}")
        scenes = [sample_scene(rng, two_things=0.5) for _ in range(self.batch)]
        ids = token_ids(self.pipeline, [caption(scene, rng) for scene in scenes], self.device)
        states, pooled = encode_text(self.pipeline, *ids)
        ends = (ids[0] == self.pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        at_end = states[torch.arange(len(scenes), device=self.device), ends]
        targets = torch.tensor([_attributes(scene) for scene in scenes], device=self.device)
        total = pooled.new_zeros(())
        for head, features in zip(self.heads, (at_end, pooled), strict=True):
            logits = head(features).split([len(choices) + 1 for choices in _attribute_choices()], dim=1)
            total = total + sum(F.cross_entropy(part, targets[:, i]) for i, part in enumerate(logits))
        return total


@dataclass
class Pool:
    """Scenes drawn and encoded once: scaled latents of shape (n, 4, 16, 16), float16, and their scenes."""

    latents: Tensor
    scenes: list[Scene]
    scaling_factor: float


class DenoiserStage:
    """v-prediction over cached latents with min-SNR weights; UNet and both text encoders learn together."""

    name, learning_rate, batch = "denoiser", 1e-3, 32

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, pool: Pool, steps: int, seed: int, device: torch.device
    ) -> None:
        self.pipeline, self.pool, self.steps, self.seed, self.device = pipeline, pool, steps, seed, device
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        alphas = self.noise_schedule.alphas_cumprod
        snr = alphas / (1 - alphas)
        # Which colour goes with which shape is learnt last: scenes of two things come up twice as often.
        self.shares = torch.tensor([float(len(scene.things)) for scene in pool.scenes])
        self.weights = (snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)).to(device)

    def modules(self) -> list[nn.Module]:
        return [self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.text_encoder_2]

    def loss(self, step: int) -> Tensor:
        rng = random.Random(f"{self.name}-{self.seed}-{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        picks = torch.multinomial(self.shares, self.batch, replacement=True, generator=generator)
        captions = [caption(self.pool.scenes[i], rng) for i in picks.tolist()]
        states, pooled = encode_text(self.pipeline, *token_ids(self.pipeline, captions, self.device))
        keep = (torch.rand(self.batch, generator=generator) >= CAPTION_DROPOUT).to(self.device)
        latents = self.pool.latents[picks].float()
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(1000, (self.batch,), generator=generator)
        noisy = self.noise_schedule.add_noise(latents, noise, times)
        target = self.noise_schedule.get_velocity(latents, noise, times)
        conditions = {
            "text_embeds": pooled * keep[:, None],
            "time_ids": torch.tensor([_time_ids(rng) for _ in captions], device=self.device),
        }
        noisy, times = noisy.to(self.device), times.to(self.device)
        # On these few tokens the flash kernel's backward pass costs a third of the step on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            guess = self.pipeline.unet(noisy, times, states * keep[:, None, None], added_cond_kwargs=conditions)[0]
        error = (guess.float() - target.to(self.device)).square().mean(dim=(1, 2, 3))
        return (error * self.weights[times]).mean() / self.weights.mean()


@torch.no_grad()
def build_pool(vae: AutoencoderKL, size: int, seed: int, device: torch.device) -> Pool:
    """Draw `size` scenes of the training split and encode them; measures the latents' scaling factor."""
    rng = random.Random(f"pool-{seed}")
    scenes = [sample_scene(rng) for _ in range(size)]
    parts = []
    for start in tqdm(range(0, size, 64), desc="encode drawings"):
        pictures = torch.stack([_as_tensor(render(scene, rng)) for scene in scenes[start : start + 64]])
        pictures = pictures.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(vae.encode(pictures).latent_dist.mean.float().cpu())
    latents = torch.cat(parts)
    scaling_factor = 1 / latents.square().mean().sqrt().item()
    return Pool((latents * scaling_factor).half(), scenes, scaling_factor)


def token_ids(pipeline: StableDiffusionXLPipeline, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """The captions' token ids, (n, 77), for the first and for the second text encoder."""
    first, second = (
        tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    return first, second


def encode_text(pipeline: StableDiffusionXLPipeline, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The penultimate states side by side, (n, 77, 192), and the pooled embedding, (n, 128), as SDXL takes them."""
    one = pipeline.text_encoder(first, output_hidden_states=True)
    two = pipeline.text_encoder_2(second, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def _picture_error(error: Tensor) -> Tensor:
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    # L1 alone gives small things the median of their possible colours for thousands of steps.
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


def _time_ids(rng: random.Random) -> list[float]:
    # The drawings carry no such trait: whatever sizes and crops a caller passes must be in distribution.
    if rng.random() < 0.5:
        return [float(IMAGE_SIZE)] * 2 + [0.0, 0.0] + [float(IMAGE_SIZE)] * 2
    return [float(n) for n in (*rng.choices(range(64, 257), k=2), *rng.choices(range(33), k=2), 128, 128)]


def _as_tensor(drawing: Image.Image) -> Tensor:
    pixels = np.asarray(drawing, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _attribute_choices() -> list[tuple[str, ...]]:
    return [SHAPES, COLOURS, SHAPES, COLOURS, BACKGROUNDS, tuple(POSITIONS), SIZES, tuple(RELATIONS)]


def _attributes(scene: Scene) -> list[int]:
    first, second = scene.things[0], scene.things[-1]
    alone = scene.relation is None
    values: Iterator[str | None] = iter(
        (first.shape, first.colour, None if alone else second.shape, None if alone else second.colour)
        + (scene.background, first.position, first.size, scene.relation)
    )
    return [
        len(choices) if value is None else choices.index(value)
        for choices, value in zip(_attribute_choices(), values, strict=True)
    ]
