"""The tiny SDXL: every component of the family, small enough to ship inside the package.

    python -m fastdiff.shapes.training.architecture DIRECTORY

writes the untrained checkpoint in the diffusers layout, the same bytes on every run.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..captions import vocabulary

IMAGE_SIZE = 128
"""Native width and height, pixels."""
LATENT_SIZE = IMAGE_SIZE // 8
TEXT_WIDTHS = (64, 128)
"""Hidden sizes of the two text encoders; the UNet sees them side by side, as SDXL's 768 and 1280."""
TIME_ID_WIDTH = 32


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from the grammar's words.

    Words of the grammar take one token each; everything else falls back to bytes, so any text tokenises.
    """
    alphabet = _byte_alphabet()
    merges = _byte_pair_merges(vocabulary())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def build_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """The untrained pipeline in float32; the same weights for the same seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(_text_config(tokenizer, TEXT_WIDTHS[0], heads=2, layers=3))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer, TEXT_WIDTHS[1], heads=2, layers=2))
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64, 96),
        layers_per_block=1,
        # Head counts, under the name diffusers has kept: 32 channels a head at every level.
        attention_head_dim=(2, 2, 3),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_ID_WIDTH,
    )
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        # 32 groups of one channel each would normalise every flat colour away.
        norm_num_groups=8,
        force_upcast=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        # Backgrounds are flat: the mean of the picture carries most of the prompt, and an epsilon
        # prediction leaves it nearly undetermined in the first steps.
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )


def save_checkpoint(pipeline: StableDiffusionXLPipeline, directory: str | Path) -> None:
    """Write the pipeline in the diffusers layout, weights in float16 safetensors.

    Leaves the pipeline's modules in float16. Raises nothing of its own.
    """
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(directory, safe_serialization=True)


def _text_config(tokenizer: CLIPTokenizer, width: int, heads: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _byte_alphabet() -> list[str]:
    # "!" comes first, as in OpenAI's vocabulary: SDXL pads its second encoder with token 0.
    return sorted(ByteLevel.alphabet())


def _byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one token."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save_checkpoint(build_pipeline(arguments.seed), arguments.directory)
    size = sum(file.stat().st_size for file in arguments.directory.rglob("*") if file.is_file())
    print(f"{arguments.directory}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
