"""The winner among measured options."""

from __future__ import annotations

from .question import Outcome

# How many times as fast as what is in place an option has to be, by the shortest times: other work on the machine
# widens the spread, and by its lower end the same machine would choose otherwise in a busy minute. One that changes
# nothing but rounding is taken unless it is clearly slower: in a model, where weights come from memory and not from the
# cache, it gains more than measured here; and so runs that differ by noise choose the same.
LOSSLESS_MARGIN, LOSSY_MARGIN = 0.90, 1.10


def choose(outcomes: dict[str, Outcome], allowed: tuple[str, ...]) -> str:
    """The option to take; the first, plain one if no other is right and clearly faster.

    Args:
        outcomes: by name, as measured, the plain option first.
        allowed: names that may be taken besides the plain one.
    """
    best, *others = outcomes
    for name in others:
        outcome = outcomes[name]
        if name not in allowed or outcome.refused is not None:
            continue
        low, middle, _ = outcome.ratio
        if not outcome.lossless and low < 1:  # one short call may be luck
            continue
        margin = LOSSLESS_MARGIN if outcome.lossless else LOSSY_MARGIN
        if middle >= margin * outcomes[best].ratio[1]:
            best = name
    return best
