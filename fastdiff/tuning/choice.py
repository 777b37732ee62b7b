"""The winner among measured options."""

from __future__ import annotations

from .question import Outcome

# How much faster than what is in place an option has to be, beyond the spread: one that changes nothing but rounding,
# and one that costs quality.
LOSSLESS_MARGIN, LOSSY_MARGIN = 1.02, 1.10


def choose(outcomes: dict[str, Outcome], allowed: tuple[str, ...]) -> str:
    """The option to take; the first, plain one if no other is right and clearly faster.

    Args:
        outcomes: by name, as measured, the plain option first.
        allowed: names that may be taken besides the plain one.
    """
    best, *others = outcomes
    for name in others:
        outcome = outcomes[name]
        margin = LOSSLESS_MARGIN if outcome.lossless else LOSSY_MARGIN
        if name in allowed and outcome.refused is None and outcome.ratio[0] >= margin * outcomes[best].ratio[1]:
            best = name
    return best
