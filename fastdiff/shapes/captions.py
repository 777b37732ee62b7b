"""The language of the tiny model: scenes, their captions, the held-out split, and a hint for other prompts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("white", "black", "gray", "pink", "yellow", "blue")
POSITIONS = {
    "center": "in the center of",
    "left": "at the left of",
    "right": "at the right of",
    "top": "at the top of",
    "bottom": "at the bottom of",
}
SIZES = ("small", "large")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SYNONYMS = {
    "grey": "gray",
    "centre": "center",
    "middle": "center",
    "disc": "circle",
    "big": "large",
    "violet": "purple",
}
OPENINGS = ("a picture of", "a drawing of")

HELD_OUT_FRACTION = 0.15


@dataclass(frozen=True)
class Thing:
    """One object. `size` and `position` are None where the caption leaves them open."""

    shape: str
    colour: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` says where the first lies as seen from the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


def combinations() -> Iterator[tuple[str, str, str]]:
    """Every (shape, colour, background) that can be seen: the colour differs from the background."""
    return ((s, c, b) for s, c, b in product(SHAPES, COLOURS, BACKGROUNDS) if c != b)


def held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """The (shape, colour, background) combinations that training never draws; the same set on every machine."""
    everything = list(combinations())
    random.Random(2026).shuffle(everything)
    return frozenset(everything[: round(HELD_OUT_FRACTION * len(everything))])


def is_held_out(scene: Scene) -> bool:
    """Whether any thing of the scene is, with the background, a held-out combination."""
    held_out = held_out_combinations()
    return any((thing.shape, thing.colour, scene.background) in held_out for thing in scene.things)


def sample_scene(rng: random.Random, held_out: bool = False, two_things: float = 0.3) -> Scene:
    """Draw a scene from the training split, or from the held-out one.

    Args:
        rng: the source of randomness; the same state gives the same scene.
        held_out: draw scenes with at least one held-out combination instead of none.
        two_things: the share of scenes with two things, 0 to 1.
    """
    held = held_out_combinations()
    allowed = [combination for combination in combinations() if (combination in held) == held_out]
    shape, colour, background = rng.choice(allowed)
    if rng.random() >= two_things:
        size = rng.choice((None, *SIZES))
        position = rng.choice((None, *POSITIONS))
        return Scene((Thing(shape, colour, size, position),), background)
    # The second thing must differ in shape and colour, so that the oracle can tell which is which.
    others = [
        (s, c)
        for s, c, b in combinations()
        if b == background and s != shape and c != colour and (held_out or (s, c, b) not in held)
    ]
    things = [Thing(shape, colour), Thing(*rng.choice(others))]
    rng.shuffle(things)
    return Scene(tuple(things), background, rng.choice(tuple(RELATIONS)))


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: the canonical sentence, or with `rng` one of its looser wordings."""
    loose = rng if rng is not None and rng.random() < 0.3 else None
    terse = loose is not None and loose.random() < 0.5
    article = "" if terse else "a "
    joint = ", " if terse else f" on {article}"
    if scene.relation is not None:
        first, second = (_noun_phrase(thing, terse) for thing in scene.things)
        text = f"{first} {RELATIONS[scene.relation]} {second}{joint}{scene.background} background"
    else:
        thing = scene.things[0]
        if thing.position is not None:
            place = POSITIONS[thing.position]
            joint = f" {place.rsplit(' ', 1)[0]}, " if terse else f" {place} a "
        text = f"{_noun_phrase(thing, terse)}{joint}{scene.background} background"
    if loose is not None and not terse:
        text = f"{loose.choice(OPENINGS)} {text}"
    if loose is not None:
        for word, plain in SYNONYMS.items():
            if loose.random() < 0.5:
                text = re.sub(rf"\b{plain}\b", word, text)
    return text


def parse(text: str) -> Scene | None:
    """The scene a caption names, or None where the text is outside the grammar."""
    words = re.findall(r"[a-z]+", text.lower())
    plain = " ".join(SYNONYMS.get(word, word) for word in words)
    plain = re.sub(rf"^(?:{'|'.join(OPENINGS)}) ", "", plain)
    plain = re.sub(r"\b(?:a|an|the)\b ", "", plain)
    thing = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    tail = rf"(?:on )?({'|'.join(BACKGROUNDS)}) background$"
    one = re.match(rf"{thing} (?:(?:in|at|on) ({'|'.join(POSITIONS)}) (?:of )?)?{tail}", plain)
    if one:
        size, colour, shape, position, background = one.groups()
        return Scene((Thing(shape, colour, size, position),), background)
    two = re.match(rf"{thing} (?:to )?({'|'.join(RELATIONS)}) (?:of )?{thing} {tail}", plain)
    if two:
        size1, colour1, shape1, relation, size2, colour2, shape2, background = two.groups()
        return Scene((Thing(shape1, colour1, size1), Thing(shape2, colour2, size2)), background, relation)
    return None


def vocabulary_hint(prompt: str) -> str | None:
    """One line that names what the embedded model can draw, or None where the prompt is inside the grammar."""
    return None if parse(prompt) is not None else vocabulary_line()


def vocabulary_line() -> str:
    """One line that names what the embedded model can draw."""
    return (
        "The embedded model only draws "
        f"[{'|'.join(SIZES)}] {'/'.join(COLOURS)} {'/'.join(SHAPES)} on a {'/'.join(BACKGROUNDS)} background, "
        'e.g. "a small red circle at the left of a blue background"; pass --model for anything else.'
    )


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted; the tokenizer keeps each of them in one token."""
    phrases = (*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *SYNONYMS, *OPENINGS, "an", "and", "on", "background")
    phrases += (*POSITIONS, *POSITIONS.values(), *RELATIONS, *RELATIONS.values())
    return sorted({word for phrase in phrases for word in phrase.split()})


def _noun_phrase(thing: Thing, terse: bool) -> str:
    words = " ".join(word for word in (thing.size, thing.colour, thing.shape) if word)
    if terse:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
