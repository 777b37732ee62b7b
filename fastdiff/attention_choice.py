"""Which kernel attention takes on this machine: asks `tuning` about the ones that `models` has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .choices import MIN_PARAMETERS, table_line, tuner_for
from .models.attention_backends import DTYPES, Backend, backends
from .models.attention_kernel import DTYPE, HEAD_DIM, attend, attend_in_products, attending, kind_of, load_attention
from .models.context import appended_tokens
from .tuning import Answers, AttentionSize, Outcome, attention_question, choose, input_shapes

OURS, PRODUCTS = "our kernel", "two products"
_LOSSY = (PRODUCTS,)
# Of tuning, for all sizes of a model.
_SECONDS = 1.0
# A kernel of PyTorch's has to be so many times as fast as the one that it takes by itself.
_MARGIN = 1.03


class AttentionChoice(NamedTuple):
    """The kernels of the kinds of attention, `"self"` and `"cross"`, that do not have PyTorch's choice, and why."""

    kernels: Mapping[str, Callable]
    reason: str
    lossless: bool = True


def left_to_pytorch(why: str) -> AttentionChoice:
    """No kernel, and why."""
    return AttentionChoice({}, f"left to PyTorch: {why}")


def choose_attention(model: Any, tuning: str, lossy: bool, bar: dict | None = None) -> AttentionChoice:
    """Choose for a UNet or ControlNet by measurement: on a CPU a kernel of ours, on a GPU one of PyTorch's.

    Args:
        model: where it is small it is left to PyTorch.
        tuning: of `FastConfig`; what was not measured is left to PyTorch.
        lossy: whether a kernel that rounds more than PyTorch's may be taken.
        bar: arguments of the progress bar.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < MIN_PARAMETERS:
        return left_to_pytorch("the model is small")
    if tuning == "off":
        return left_to_pytorch('nothing is measured with tuning="off"')
    if (why := _why_none(model)) is not None:
        return left_to_pytorch(why)
    kernels, sizes = _kernels(model), attention_sizes(model)
    if model.device.type == "cpu":
        [(name, kernel)] = kernels.items()
        if name in _LOSSY and not lossy:
            return left_to_pytorch("our kernel needs a C++ compiler and AVX512-BF16")
        return _wherever_it_wins(name, kernel, sizes, measure_attention(model, sizes, tuning, bar))
    answers = measure_attention(model, sizes, tuning, bar)
    # Measured alone; in pictures, others take what one cannot.
    return _fastest(sizes, answers, {name: Backend(name) for name in kernels})


def _kernels(model: Any) -> Mapping[str, Callable]:
    """What there is to choose from besides PyTorch's choice."""
    if model.device.type != "cpu":
        return backends()
    return {PRODUCTS: attend_in_products} if load_attention() is None else {OURS: attend}


def _why_none(model: Any) -> str | None:
    """Why there are no kernels to measure on this device."""
    if model.device.type == "cpu":
        if model.dtype != DTYPE:
            return "there are other kernels in bfloat16 alone"
        return None
    if model.device.type != "cuda":
        return f"no kernels to choose from on {model.device.type}"
    return None if model.dtype in DTYPES else f"in {str(model.dtype).removeprefix('torch.')} there is one kernel"


def _wherever_it_wins(name: str, kernel: Callable, sizes: list[AttentionSize], answers: Answers) -> AttentionChoice:
    # A kind takes the kernel if it wins at every size.
    won = {size: choose(answers[size.key], (name,)) == name for size in sizes if size.key in answers}
    kinds = frozenset(size.kind for size in won) - {size.kind for size, wins in won.items() if not wins}
    ratios = [answers[size.key][name].ratio[1] for size in won if size.kind in kinds]
    if not kinds:
        refused = {str(found[name].refused) for found in answers.values() if found[name].refused is not None}
        return left_to_pytorch("; ".join(sorted(refused)) or f"measured here, {name} is no faster")
    times = f"measured here {min(ratios):.2g} to {max(ratios):.2g} times PyTorch's"
    reason = f"{' and '.join(sorted(kinds, reverse=True))}-attention by {name}, {times}"
    return AttentionChoice(dict.fromkeys(kinds, kernel), reason, name not in _LOSSY)


def _fastest(sizes: list[AttentionSize], answers: Answers, kernels: Mapping[str, Callable]) -> AttentionChoice:
    chosen, reasons = {}, []
    for kind in ("self", "cross"):
        found = [answers[size.key] for size in sizes if size.kind == kind and size.key in answers]
        # A kernel has to win at every size; of those that do, the one whose least gain is largest.
        gains = {name: [_gain(outcomes.get(name)) for outcomes in found] for name in kernels if found}
        won = {name: ratios for name, ratios in gains.items() if min(ratios) >= _MARGIN}
        if won:
            best = max(won, key=lambda name: min(won[name]))
            chosen[kind] = kernels[best]
            low, high = min(won[best]), max(won[best])
            reasons.append(f"{kind}-attention by {best}, measured here {low:.3g} to {high:.3g} times PyTorch's choice")
    if not chosen:
        return left_to_pytorch("measured here, none of its kernels is faster than its choice")
    return AttentionChoice(chosen, "; ".join(reasons))


def _gain(outcome: Outcome | None) -> float:
    return 0.0 if outcome is None or outcome.refused is not None else outcome.ratio[1]


def attention_sizes(model: Any, side: int | None = None) -> list[AttentionSize]:
    """What the layers that take other kernels attend over, at the model's own size or that of latents of `side`."""
    found, shapes = set(), input_shapes(model, side)
    for name, layer in attending(model).items():
        queries, keys = shapes.get(f"{name}.to_q"), shapes.get(f"{name}.to_k")
        if queries is None or keys is None:
            continue
        head_dim = layer.inner_dim // layer.heads
        if model.device.type == "cpu" and head_dim != HEAD_DIM:
            continue
        kind = kind_of(layer)
        masked = appended_tokens(keys[1]) if kind == "cross" else 0
        found.add(AttentionSize(kind, layer.heads, head_dim, queries[1], keys[1] + masked, masked, model.dtype))
    return sorted(found)


def attention_table(models: list[Any], tuning: str, lossy: bool, side: int | None) -> list[str]:
    """Measure anew, whatever is known; returns a line for each distinct size (see `choices.form_table`)."""
    lines = []
    for model in models:
        if _why_none(model) is None and (sizes := attention_sizes(model, side)):
            answers = measure_attention(model, sizes, tuning, again=True)
            allowed = tuple(name for name in _kernels(model) if lossy or name not in _LOSSY)
            lines += [table_line(key, outcomes, choose(outcomes, allowed)) for key, outcomes in answers.items()]
    return lines


def measure_attention(
    model: Any, sizes: list[AttentionSize], tuning: str, bar: dict | None = None, again: bool = False
) -> Answers:
    """What is known, or measured now, of those sizes, by their keys."""
    kernels = _kernels(model)
    return tuner_for(model, tuning).ask(
        (size.key for size in sizes),
        lambda keys: [
            attention_question(size, kernels, model.device, lossy=_LOSSY) for size in sizes if size.key in keys
        ],
        bar,
        again,
        _SECONDS,
    )
