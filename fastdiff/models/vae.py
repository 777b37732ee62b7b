"""`FastAutoencoderKL`: the stock VAE with fused attention and blocks that compile."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from ..identity import stands_in_for
from .base import FastModelMixin
from .conversion import share_weights
from .finite import note_finite
from .outputs import answers_by_name


@answers_by_name
class EncodedImage(NamedTuple):
    """What `encode` returns: a tuple of one, whose element also goes by its stock name."""

    latent_dist: DiagonalGaussianDistribution


@answers_by_name
class DecodedImage(NamedTuple):
    """What `decode` and `forward` return: a tuple of one, whose element also goes by its stock name."""

    sample: torch.Tensor


@stands_in_for(AutoencoderKL)
class FastAutoencoderKL(FastModelMixin, AutoencoderKL):
    """SDXL's VAE, equal to the stock one within rounding; made as a stock one is, or with `from_stock`.

    `encode`, `decode` and `forward` return tuples by default; `return_dict=True` gives the stock output objects.
    Weights, state-dict keys and `save_pretrained` are those of `AutoencoderKL`.
    """

    _repeated_blocks = ["Encoder", "Decoder"]
    _regions = ("ResnetBlock2D", "FastAttention", "Downsample2D", "Upsample2D")

    @functools.wraps(AutoencoderKL.__init__)  # type: ignore[misc]  # for `inspect`, which diffusers asks
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_fast()

    @classmethod
    def from_stock(cls, vae: AutoencoderKL) -> FastAutoencoderKL:
        """Make a fast VAE over the weights of a stock one: the same storages, no copy.

        Raises:
            TypeError: if `vae` is no `AutoencoderKL`.
        """
        if isinstance(vae, cls):
            return vae
        fast = share_weights(vae, AutoencoderKL, cls)
        fast._make_fast()
        return fast

    def encode(self, x: torch.Tensor, return_dict: bool = False) -> EncodedImage | AutoencoderKLOutput:
        """Encode images, (batch, 3, height, width) in [-1, 1], to a distribution over latents."""
        output = super().encode(x, return_dict=True)
        return output if return_dict else EncodedImage(output.latent_dist)

    def decode(
        self, z: torch.Tensor, return_dict: bool = False, generator: torch.Generator | None = None
    ) -> DecodedImage | DecoderOutput:
        """Decode unscaled latents, (batch, latent_channels, height / 8, width / 8), to images in [-1, 1]."""
        if not torch.compiler.is_compiling():
            note_finite("latents", z)
        output = super().decode(z, return_dict=True, generator=generator)
        return output if return_dict else DecodedImage(output.sample)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = False,
        generator: torch.Generator | None = None,
    ) -> DecodedImage | DecoderOutput:
        """Encode and decode images."""
        output = super().forward(sample, sample_posterior, return_dict=True, generator=generator)
        return output if return_dict else DecodedImage(output.sample)
