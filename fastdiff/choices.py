"""Which form each layer of a model takes on this machine: asks `tuning` about the forms that `weights` has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import FastConfig
from .models.attention_kernel import load_attention
from .models.base import FastModelMixin
from .models.memory_format import apply_channels_last
from .tuning import PLAIN, Answers, Outcome, Tuner, choose, input_shapes, layer_key, layer_questions, tuner_of
from .weights.activations import load_kernels
from .weights.places import CANDIDATES, INT8, PACKED, count_weights, form_of, places, shipped_choice

# Below this many parameters layers are so small that what they cost is the way through Python. VAEs have more.
MIN_PARAMETERS = 10_000_000
# Places with fewer, such as first and last convolutions, stay plain in a model of some size: they have nothing to gain.
_MIN_WEIGHTS = 65_536
# Of tuning, for each parameter of a model, up to what a UNet gets.
_SECONDS_PER_PARAMETER, _MAX_SECONDS = 2e-8, 2.0


@dataclass(frozen=True)
class FormChoices:
    """The form of each place of a model.

    Attributes:
        forms: by name of the place.
        ratios: by form, the lowest and the highest measured ratio to plain among the places that take it.
        refused: by form, why places may not take it, as measured.
    """

    forms: dict[str, str]
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    refused: dict[str, set[str]] = field(default_factory=dict)

    def taking(self, form: str) -> set[str]:
        """The names of the places that take a form."""
        return {name for name, chosen in self.forms.items() if chosen == form}

    def describe(self, form: str) -> str:
        """How the choice of a form came about, for `explain()`."""
        if form not in self.ratios:
            return "by the shipped table"
        low, high = self.ratios[form]
        return f"measured here {low:.2g} to {high:.2g} times plain"


def choose_for_pipeline(
    denoisers: list, vae: list, config: FastConfig, *, int8: bool, can_pack: bool, bar: dict
) -> dict[object, FormChoices]:
    """Choose for the models of a pipeline.

    Args:
        denoisers: UNet and ControlNets.
        vae: the VAE, or none.
        config: its `quantization` and `pack_weights` may ask for forms by name.
        int8: whether int8 is allowed.
        can_pack: whether packing is.
        bar: arguments of the progress bar.

    Raises:
        ValueError: int8 is asked for by name, and no layer can take it.
    """
    allowed = [PACKED.name] * can_pack + [INT8.name] * int8
    asked = [PACKED.name] * (can_pack and config.pack_weights is True)
    by_name = [INT8.name] * (int8 and config.quantization == "int8-dynamic")
    chosen = {model: choose_forms(model, config.tuning, allowed, asked + by_name, bar) for model in denoisers}
    refused = {reason for choices in chosen.values() for reason in choices.refused.get(INT8.name, ())}
    if by_name and refused and not any(choices.taking(INT8.name) for choices in chosen.values()):
        raise ValueError(
            "quantization='int8-dynamic' was measured on this machine and can be taken for no layer: "
            f"{'; '.join(sorted(refused))}. Use 'auto', 'none' or 'int8-weight-only'."
        )
    return {**chosen, **{model: choose_forms(model, config.tuning, allowed, asked, bar) for model in vae}}


def choose_forms(
    model: nn.Module,
    tuning: str,
    allowed: Collection[str],
    asked: Collection[str] = (),
    bar: dict | None = None,
) -> FormChoices:
    """Choose, by measurement where the model is of some size, or forms are asked for by name.

    Args:
        model: a UNet, ControlNet or VAE on a CPU.
        tuning: of `FastConfig`.
        allowed: names of the forms that may be taken where they win.
        asked: names of those that are taken wherever they are right and not much too slow.
        bar: arguments of the progress bar.
    """
    found, allowed = places(model), {*allowed, *asked}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answers: Answers = {}
    if tuning != "off" and allowed and (parameters >= MIN_PARAMETERS or asked):
        measured = found if asked else _of_some_size(found)
        answers = _measured(model, measured, tuning, bar, min(_MAX_SECONDS, _SECONDS_PER_PARAMETER * parameters))
    forms: dict[str, str] = {}
    ratios: dict[str, list[float]] = {}
    refused: dict[str, set[str]] = {}
    for name, place in found.items():
        outcomes = answers.get(layer_key(place))
        fits = tuple(each.name for each in CANDIDATES if each.name in allowed and each.takes(name, place))
        if outcomes is None:
            small = answers and count_weights(place) < _MIN_WEIGHTS
            forms[name] = PLAIN if small else shipped_choice(name, place, fits)
            continue
        known = [form for form in fits if form in outcomes]
        for form in known:
            if (reason := outcomes[form].refused) is not None:
                refused.setdefault(form, set()).add(reason)
        by_name = [form for form in known if form in asked and outcomes[form].refused is None]
        forms[name] = by_name[-1] if by_name else choose(outcomes, fits)
        if forms[name] != PLAIN:
            ratios.setdefault(forms[name], []).append(outcomes[forms[name]].ratio[1])
    return FormChoices(forms, {form: (min(all_), max(all_)) for form, all_ in ratios.items()}, refused)


def tuned_models(pipe: Any) -> list[Any]:
    """The models of a fast pipeline whose forms are chosen by measurement; none with preset "off"."""
    models = [pipe.unet, getattr(pipe, "controlnet", None), pipe.vae]
    return [model for model in models if isinstance(model, FastModelMixin)]


def tuning_digest(pipe: Any) -> str | None:
    """What stands for the measurements that a fast pipeline's choices may come from; None where there are none.

    Where it is equal, layers have equal forms, and pictures equal bits.
    """
    models, tuning = tuned_models(pipe), pipe.active_config.tuning
    if tuning == "off" or not models:
        return None
    tuner = tuner_for(models[0], tuning)
    return tuner.digest if tuner.answers else None


def measure_again(model: Any, tuning: str, side: int | None) -> Answers:
    """Measure the layers of a model, whatever is known of them.

    Args:
        model: on a CPU.
        tuning: of `FastConfig`.
        side: of the latents to measure at; the model's own if None.
    """
    apply_channels_last(model, True)
    return _measured(model, _of_some_size(places(model)), tuning, None, _MAX_SECONDS, side, again=True)


def form_table(model: Any, answers: Answers) -> list[str]:
    """A line for each distinct shape that was measured, with the forms that its layers have now."""
    forms: dict[str, Counter[str]] = {}
    for place in places(model).values():
        forms.setdefault(layer_key(place), Counter())[form_of(place)] += 1
    return [
        f"{forms[key].total():4} x {table_line(key, outcomes, ' and '.join(sorted(forms[key])))}"
        for key, outcomes in answers.items()
    ]


def table_line(key: str, outcomes: dict[str, Outcome], taken: str) -> str:
    """What was measured for a key, the plain option first, and which option is taken."""
    plain = next(iter(outcomes))
    shown = ", ".join(_show(name, outcome, plain) for name, outcome in outcomes.items())
    return f"{key}: {shown}; taken: {taken}"


def _show(name: str, outcome: Outcome, plain: str) -> str:
    if outcome.refused is not None:
        return f"{name} refused ({outcome.refused})"
    low, middle, high = outcome.ratio
    times = "" if name == plain else f" ({middle:.2f} times {plain}, {low:.2f} to {high:.2f})"
    return f"{name} {outcome.ms:.3g} ms{times}"


def _of_some_size(found: dict[str, Any]) -> dict[str, Any]:
    return {name: place for name, place in found.items() if count_weights(place) >= _MIN_WEIGHTS}


def _measured(
    model: Any,
    found: dict[str, Any],
    tuning: str,
    bar: dict | None,
    seconds: float,
    side: int | None = None,
    again: bool = False,
) -> Answers:
    return tuner_for(model, tuning).ask(
        map(layer_key, found.values()),
        lambda keys: layer_questions(found, CANDIDATES, keys, lambda: input_shapes(model, side)),
        bar,
        again,
        seconds,
    )


def tuner_for(model: Any, tuning: str) -> Tuner:
    """What asks this machine for a model, and remembers."""
    device = next(model.parameters()).device
    if device.type != "cpu":  # nothing to compile for
        return tuner_of(tuning, device)
    facts = {"activations": load_kernels() is not None, "attention": load_attention() is not None}
    return tuner_of(tuning, device, tuple((name, "compiled" if has else "operators") for name, has in facts.items()))
