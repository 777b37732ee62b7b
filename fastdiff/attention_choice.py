"""Which kernel attention takes on this machine: asks `tuning` about the ones that `models` has."""

from __future__ import annotations

from typing import Any, NamedTuple

from .choices import MIN_PARAMETERS, table_line, tuner_for
from .models.attention_kernel import DTYPE, HEAD_DIM, attend, attending, kind_of, load_attention
from .models.context import appended_tokens
from .tuning import Answers, AttentionSize, attention_question, choose, input_shapes

OURS = "our kernel"
# Of tuning, for all sizes of a model.
_SECONDS = 1.0


class AttentionChoice(NamedTuple):
    """The kinds of attention, `"self"` and `"cross"`, that take our kernel, and how that came about."""

    kinds: frozenset[str]
    reason: str


def choose_attention(model: Any, tuning: str, bar: dict | None = None) -> AttentionChoice:
    """Choose for a UNet or ControlNet on a CPU, by measurement.

    Args:
        model: where it is small it is left to PyTorch.
        tuning: of `FastConfig`; what was not measured is left to PyTorch.
        bar: arguments of the progress bar.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < MIN_PARAMETERS:
        return AttentionChoice(frozenset(), "left to PyTorch: the model is small")
    if tuning == "off":
        return AttentionChoice(frozenset(), 'left to PyTorch: nothing is measured with tuning="off"')
    if model.dtype != DTYPE:
        return AttentionChoice(frozenset(), "left to PyTorch: our kernel takes bfloat16")
    if load_attention() is None:
        why = "no C++ compiler was found, or the processor lacks AVX512-BF16"
        return AttentionChoice(frozenset(), f"left to PyTorch: {why}")
    sizes = attention_sizes(model)
    answers = measure_attention(model, sizes, tuning, bar)
    # A kind takes the kernel if it wins at every size.
    won = {size: choose(answers[size.key], (OURS,)) == OURS for size in sizes if size.key in answers}
    kinds = frozenset(size.kind for size in won) - {size.kind for size, wins in won.items() if not wins}
    ratios = [answers[size.key][OURS].ratio[1] for size in won if size.kind in kinds]
    if not kinds:
        refused = {str(found[OURS].refused) for found in answers.values() if found[OURS].refused is not None}
        why = "; ".join(sorted(refused)) or "measured here, our kernel is no faster"
        return AttentionChoice(kinds, f"left to PyTorch: {why}")
    times = f"measured here {min(ratios):.2g} to {max(ratios):.2g} times PyTorch's"
    return AttentionChoice(kinds, f"{' and '.join(sorted(kinds, reverse=True))}-attention by our kernel, {times}")


def attention_sizes(model: Any, side: int | None = None) -> list[AttentionSize]:
    """What the layers that our kernel can take attend over, at the model's own size or that of latents of `side`."""
    found, shapes = set(), input_shapes(model, side)
    for name, layer in attending(model).items():
        queries, keys = shapes.get(f"{name}.to_q"), shapes.get(f"{name}.to_k")
        if queries is None or keys is None or layer.inner_dim != HEAD_DIM * layer.heads:
            continue
        kind = kind_of(layer)
        masked = appended_tokens(keys[1]) if kind == "cross" else 0
        found.add(AttentionSize(kind, layer.heads, HEAD_DIM, queries[1], keys[1] + masked, masked))
    return sorted(found)


def attention_table(models: list[Any], tuning: str, side: int | None) -> list[str]:
    """Measure anew, whatever is known; returns a line for each distinct size (see `choices.measured_table`)."""
    lines = []
    for model in models if load_attention() is not None else ():
        if model.dtype == DTYPE and (sizes := attention_sizes(model, side)):
            answers = measure_attention(model, sizes, tuning, again=True)
            lines += [table_line(key, outcomes) for key, outcomes in answers.items()]
    return lines


def measure_attention(
    model: Any, sizes: list[AttentionSize], tuning: str, bar: dict | None = None, again: bool = False
) -> Answers:
    """What is known, or measured now, of those sizes, by their keys."""
    return tuner_for(model, tuning).ask(
        (size.key for size in sizes),
        lambda keys: [attention_question(size, {OURS: attend}) for size in sizes if size.key in keys],
        bar,
        again,
        _SECONDS,
    )
