"""Finding out: each option checked against the plain one, then all of them timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .question import KINDS, Option, Outcome, Question

# Times as slow as plain from which an option is a mistake, such as a reference kernel, and not worth a longer look.
SLOW = 10
# Calls are as large as the model's own, or as large as take so long.
_CALL_S = 0.0025
# Of which the shortest says it: the first call at a size prepares things.
_LOOKS = 3
# Calls that are shorter are timed several at once.
_SAMPLE_S = 0.001
_MIN_ROUNDS, _MAX_ROUNDS = 3, 45
_PROBE = 1 / 64
# Below this, what is slow is the way through Python, and the machine's noise.
_PROBE_S = 0.0005
# What a call that seems too slow is given to show that it is not.
_PATIENT_S = 0.1
# Where the third shortest call takes so many times as long as the shortest, the rest of the machine is busy, and timing
# goes on so many times as long.
_NOISE, _PATIENCE = 1.03, 3


@torch.no_grad()
def measure(question: Question, seconds: float) -> dict[str, Outcome]:
    """Answer a question.

    Args:
        question: its options are made, tried with few rows, checked, and timed, in this order, so that a wrong one is
            never timed and a very slow one is called but once or twice.
        seconds: that it may take, roughly; timing ends with them, but not before a few rounds.

    Returns:
        By name of the option, in their order.

    Raises:
        Exception: whatever the plain option raises.
    """
    started = time.perf_counter()
    synchronize = _synchronize_of(question.inputs("one row", 1.0))
    plain, *others = question.options
    functions = {plain.name: plain.make()}
    probe = {kind: question.inputs(kind, _PROBE) for kind in KINDS}
    expected = {kind: functions[plain.name](*inputs) for kind, inputs in probe.items()}
    plain_s = _patient_seconds(functions[plain.name], probe["one row"], synchronize, 0.0)
    outcomes = {plain.name: Outcome(lossless=plain.lossless)}
    for option in others:
        try:
            function = option.make()
            outcomes[option.name] = _check(question, option, function, probe, expected, plain_s, synchronize)
            functions[option.name] = function
        except Exception as error:  # whatever a kernel raises: the others are still there
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            outcomes[option.name] = Outcome(refused=reason, lossless=option.lossless)
    fit = {name: function for name, function in functions.items() if outcomes[name].refused is None}
    inputs = question.inputs("ordinary", _share(functions[plain.name], question, synchronize))
    remaining = seconds - (time.perf_counter() - started)
    for name, (ms, ratio) in _race(fit, plain.name, inputs, remaining, synchronize).items():
        refused = f"{1 / ratio[1]:.0f} times as slow as plain" if ratio[1] < 1 / SLOW else None
        outcomes[name] = Outcome(ms, ratio, outcomes[name].error, refused, outcomes[name].lossless)
    return outcomes


def _check(question, option: Option, function, probe, expected, plain_s, synchronize) -> Outcome:
    """The outcome so far: the error, or why the option is refused."""
    limit = SLOW * max(plain_s, _PROBE_S)
    seconds = _patient_seconds(function, probe["one row"], synchronize, limit)
    if seconds > limit:
        return Outcome(refused=f"{seconds / plain_s:.0f} times as slow as plain with one row", lossless=option.lossless)
    limit, worst = question.tolerance if option.lossless else question.lossy_tolerance, 0.0
    for kind, inputs in probe.items():
        error = _distance(function(*inputs), expected[kind])
        worst = max(worst, error)
        if not error <= limit:  # also where it is not a number
            return Outcome(
                error=error, refused=f"wrong by {error:.2g} with {kind}", lossless=option.lossless
            )
    return Outcome(error=worst, lossless=option.lossless)


def _race(functions: dict[str, Callable], plain: str, inputs: tuple, seconds: float, synchronize) -> dict:
    """Time functions in turn; returns milliseconds and ratios to the plain one by name.

    What the rest of the machine does makes calls slower and none faster. So the shortest times are compared, and from
    them to the third shortest is the spread: that of more calls is narrower, which a quartile's would not be.
    """
    started = time.perf_counter()
    # The first call at a size prepares things; the shortest three do not see it.
    first = {name: _seconds(function, inputs, synchronize) for name, function in functions.items()}
    limit = SLOW * max(_PROBE_S, first[plain])
    first = {name: once if once <= limit else _patient_seconds(functions[name], inputs, synchronize, limit)
             for name, once in first.items()}
    times = {name: [once] for name, once in first.items()}
    for index in range(_MAX_ROUNDS):
        for name, function in functions.items():
            if first[name] <= limit:
                calls = max(1, min(100, round(_SAMPLE_S / first[name])))
                times[name].append(_seconds(function, inputs, synchronize, calls))
        is_noisy = any(_third(own) > _NOISE * min(own) for own in times.values())
        spent = time.perf_counter() - started
        if index + 1 >= _MIN_ROUNDS and spent > (_PATIENCE * seconds if is_noisy else seconds):
            break
    best, spread = min(times[plain]), _third(times[plain])
    return {
        name: (min(own) * 1e3, (best / _third(own), best / min(own), spread / min(own)))
        for name, own in times.items()
    }


def _third(times: list[float]) -> float:
    return sorted(times)[:3][-1]


def _share(function: Callable, question: Question, synchronize) -> float:
    """How large a call may be so that it takes `_CALL_S`, by halves."""
    share = _PROBE
    while share < 1:
        inputs = question.inputs("ordinary", share)
        seconds = min(_seconds(function, inputs, synchronize) for _ in range(_LOOKS))
        if 2 * seconds > _CALL_S * 1.5:
            break
        share *= 2
    return share


def _seconds(function: Callable, inputs: tuple, synchronize: Callable[[], None], calls: int = 1) -> float:
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        function(*inputs)
    synchronize()
    return (time.perf_counter() - started) / calls


def _patient_seconds(function: Callable, inputs: tuple, synchronize: Callable[[], None], limit: float) -> float:
    """Of the best of a few calls: the first may prepare things, and others may be held up by the rest of the machine.

    Two, or as many as fit in `_PATIENT_S` while all of them are over a limit.
    """
    best, started = _seconds(function, inputs, synchronize), time.perf_counter()
    while time.perf_counter() - started < _PATIENT_S:
        best = min(best, _seconds(function, inputs, synchronize))
        if best <= limit or not limit:
            break
    return best


def _distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    difference, norm = (value.float() - reference.float()).norm().item(), reference.float().norm().item()
    return difference / norm if norm else difference


def _synchronize_of(inputs: tuple) -> Callable[[], None]:
    device = inputs[0].device
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.get_device_module(device).synchronize(device)
