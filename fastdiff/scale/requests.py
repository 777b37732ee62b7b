"""What a picture is asked for with: one model for the rows of a batch job and the bodies of HTTP requests."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..limits import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, MIN_SIDE, SIDE_STEP, split_lora

SIZE_PATTERN = r"^[1-9][0-9]{1,4}x[1-9][0-9]{1,4}$"


class PictureRequest(BaseModel):
    """One picture: strict types, no unknown fields, and no say in which model draws it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, pattern=r"\S", description="what to draw")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT, description="what to keep out")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the same seed draws the same picture")
    size: str | None = Field(
        None,
        pattern=SIZE_PATTERN,
        description="WIDTHxHEIGHT in pixels, multiples of 8; the model's own by default",
    )
    steps: int = Field(20, ge=1, le=MAX_STEPS, description="denoising steps")
    guidance: float = Field(5.0, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, description="weight of the prompt")

    @field_validator("size")
    @classmethod
    def _size_fits_the_model(cls, size: str | None) -> str | None:
        if size is not None:
            width, height = parse_size(size)
            if width % SIDE_STEP or height % SIDE_STEP or min(width, height) < MIN_SIDE:
                raise ValueError(f"width and height must be multiples of {SIDE_STEP}, and {MIN_SIDE} or more")
        return size


class RowRequest(PictureRequest):
    """A line of a prompts file: as a request, and with adapters, as whoever writes the file runs the job."""

    lora: tuple[str, ...] = Field((), strict=False, description="FILE or FILE:WEIGHT of adapters, beside the job's")

    @field_validator("lora", mode="before")
    @classmethod
    def _one_or_several(cls, lora: object) -> object:
        return (lora,) if isinstance(lora, str) else lora

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """Files and weights."""
        return tuple(map(split_lora, self.lora))


def parse_size(size: str) -> tuple[int, int]:
    """Split `"WIDTHxHEIGHT"` into two whole numbers of pixels."""
    width, height = size.split("x")
    return int(width), int(height)


def problems(error) -> str:
    """The findings of a pydantic `ValidationError` in one line, without the input they are about."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {message(e)}" for e in error.errors())


def message(finding: dict) -> str:
    """What one finding of a pydantic error says."""
    return finding["msg"].removeprefix("Value error, ")
