"""What is measured, and what is taken: an option that is wrong or slow never is."""

from __future__ import annotations

import math
import time

import pytest
import torch

from fastdiff.tuning import Option, Outcome, Question, choose
from fastdiff.tuning.measure import measure
from fastdiff.tuning.question import KINDS


def inputs(kind: str, share: float) -> tuple[torch.Tensor]:
    rows = 1 if kind == "one row" else max(2, round(256 * share))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    x[: rows // 2 if kind == "zero rows" else rows if kind == "zeros" else 0] = 0
    return (1000 * x if kind == "large" else x,)


def slowly(x: torch.Tensor, seconds: float = 0.002) -> torch.Tensor:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return 2 * x


def question(**options) -> Question:
    """Doubling, plainly in 2 ms, or by the options given."""
    made = [Option(name, lambda f=f: f, lossless=not name.startswith("lossy")) for name, f in options.items()]
    return Question("doubling", (Option("plain", lambda: slowly), *made), inputs)


WRONG = {
    "ordinary": lambda x: 2.2 * x,
    "zero rows": lambda x: 2 * x / x.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True),
    "large": lambda x: (2 * x).clamp(-100, 100),
    "one row": lambda x: 2 * x if len(x) > 1 else x,
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_option_that_is_wrong_is_refused_however_fast_it_is(kind):
    found = measure(question(wrong=WRONG[kind], right=lambda x: x + x), 0.1)
    assert found["wrong"].ms is None and kind in found["wrong"].refused
    assert found["right"].refused is None and found["right"].error < 1e-6
    assert choose(found, ("wrong", "right")) == "right"


def test_not_a_number_counts_as_wrong():
    found = measure(question(bad=lambda x: 2 * x * math.nan), 0.1)
    assert "wrong" in found["bad"].refused and choose(found, ("bad",)) == "plain"


def test_an_option_that_raises_is_refused_and_the_others_are_measured():
    def broken(x):
        raise RuntimeError("no kernel for this")

    found = measure(question(broken=broken, right=lambda x: x + x), 0.1)
    assert found["broken"].refused == "RuntimeError: no kernel for this" and found["right"].refused is None


def test_an_option_that_cannot_be_made_is_refused():
    def make():
        raise ValueError("not on this machine")

    asked = Question("doubling", (Option("plain", lambda: slowly), Option("unmade", make)), inputs)
    assert measure(asked, 0.1)["unmade"].refused == "ValueError: not on this machine"


def test_an_option_that_is_much_too_slow_is_called_but_a_few_times():
    calls = []

    def reference_kernel(x):
        calls.append(len(x))
        return slowly(x, 0.1)

    found = measure(question(slow=reference_kernel), 0.1)
    assert set(calls) == {1} and len(calls) <= 4 and "times as slow as plain with one row" in found["slow"].refused


def test_an_option_that_is_held_up_for_a_while_is_not_refused():
    delays = iter([0.1, 0.03, 0.03])
    found = measure(question(late=lambda x: slowly(x, next(delays, 0.0))), 0.1)
    assert found["late"].refused is None and found["late"].ratio[1] > 1


def test_an_option_that_is_slow_with_many_rows_only_is_not_taken():
    def slow(x):
        return slowly(x, 0.05 if len(x) > 4 else 0.0)

    asked = Question("doubling", (Option("plain", lambda: lambda x: x + x), Option("slow", lambda: slow)), inputs)
    found = measure(asked, 0.1)
    assert "times as slow as plain" in found["slow"].refused and choose(found, ("slow",)) == "plain"


def test_a_lossy_option_may_be_further_off_and_a_lossless_one_not():
    found = measure(question(lossy=lambda x: 2.06 * x, lossless=lambda x: 2.06 * x), 0.1)
    assert found["lossy"].refused is None and 0.029 < found["lossy"].error < 0.031
    assert "wrong" in found["lossless"].refused


def outcome(low: float, middle: float, lossless: bool = True, refused: str | None = None) -> Outcome:
    return Outcome(1.0, (low, middle, middle), 0.0, refused, lossless)


@pytest.mark.parametrize(
    ("outcomes", "winner"),
    [
        ({"a": outcome(1.03, 1.05)}, "a"),
        ({"a": outcome(0.8, 0.98)}, "a"),
        ({"a": outcome(0.8, 0.88)}, "plain"),
        ({"a": outcome(1.3, 1.31, refused="wrong")}, "plain"),
        ({"a": outcome(1.3, 1.4), "b": outcome(1.1, 1.2)}, "a"),
        ({"a": outcome(1.3, 1.4), "b": outcome(1.5, 1.53, lossless=False)}, "a"),
        ({"a": outcome(1.3, 1.4), "b": outcome(1.2, 1.55, lossless=False)}, "b"),
        ({"a": outcome(1.05, 1.06, lossless=False)}, "plain"),
        ({"a": outcome(0.9, 3.0, lossless=False)}, "plain"),
        ({"forbidden": outcome(3.0, 3.0)}, "plain"),
    ],
)
def test_the_winner_is_not_clearly_slower_and_what_is_lossy_clearly_faster(outcomes, winner):
    assert choose({"plain": outcome(1.0, 1.0), **outcomes}, ("a", "b")) == winner


def test_every_kind_of_input_is_tried():
    seen = []

    def make(kind: str, share: float):
        seen.append(kind)
        return inputs(kind, share)

    measure(Question("doubling", (Option("plain", lambda: slowly),), make), 0.01)
    assert set(seen) == set(KINDS)
