"""Never worse than stock: what fails on a machine is taken off, with one warning that names it, and the picture drawn.

A step of the plan that raises while it is applied is known to the plan. Compiled code and graphs know what they stand
in for, call that, and tell of it by `note_failure`. All else that raises in a first picture is found by the frame that
it was raised in (`Failures.culprit`), taken off, and the picture drawn anew.
"""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from .config import FastConfig

T = TypeVar("T")

_current: ContextVar[Failures | None] = ContextVar("fastdiff_failures", default=None)

# The fields of `FastConfig` that take a step of the plan off.
_OFF: dict[str, dict[str, object]] = {
    "host schedule": {"host_schedule": False},
    "channels_last": {"channels_last": False},
    "fuse_qkv": {"fuse_qkv": False},
    "context_cache": {"context_cache": False},
    "quantize": {"quantization": "none"},
    "pack_weights": {"pack_weights": False},
    "attention": {"attention": "pytorch"},
    "compile": {"compile": "off"},
    "guidance_interval": {"guidance_interval": None},
    "deep_cache": {"deep_cache_interval": None},
    "cuda_graphs": {"cuda_graphs": False},
}
# Whose code runs in a step that is neither compiled nor recorded, for which these errors are caught where they arise.
_HOMES: dict[str, tuple[str, ...]] = {
    "pack_weights": ("fastdiff.weights.packed", "fastdiff.weights.packing", "fastdiff.weights.geglu"),
    "quantize": ("fastdiff.weights.int8", "fastdiff.weights.torchao_form", "fastdiff.weights.geglu", "torchao"),
    "attention": ("fastdiff.models.attention_kernel", "fastdiff.models.attention_backends"),
    "fuse_qkv": ("fastdiff.models.processor", "fastdiff.models.attention"),
    "context_cache": ("fastdiff.models.context", "fastdiff.models.processor"),
    "host schedule": ("fastdiff.schedulers",),
    "channels_last": ("fastdiff.models.memory_format", "fastdiff.models.group_norm"),
    "guidance_interval": ("fastdiff.lossy.guidance_interval",),
    "deep_cache": ("fastdiff.lossy.deep_cache",),
}


class OptimizationWarning(RuntimeWarning):
    """An optimisation failed and was taken off. The result is right."""


class Failures:
    """The steps of one pipeline's plan that failed, and why; they stay off for this pipeline.

    Args:
        strict: raise the error in place of the warning, as `FastConfig.strict` asks for.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self._reasons: dict[str, str] = {}

    def __contains__(self, step: str) -> bool:
        return step in self._reasons

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the plan's steps that failed."""
        return tuple(self._reasons)

    def get(self, step: str) -> str | None:
        """Why a step failed, or None."""
        return self._reasons.get(step)

    def attempt(self, step: str, apply: Callable[[], T]) -> T | None:
        """Apply a step of the plan by `without`'s configuration, once more if it fails: then to take it off.

        Returns:
            The result; None where not even taking it off went well: half of a step gives right results, too.
        """
        if step not in self:
            try:
                return apply()
            except Exception as error:
                if is_answer(error):
                    raise
                self.note(step, error)
        try:
            return apply()
        except Exception as error:
            if is_answer(error):
                raise
            return None

    def note(self, step: str, error: Exception) -> None:
        """Remember that a step of the plan failed, and warn of it once.

        Raises:
            Exception: `error` itself, with `strict`.
        """
        if self.strict:
            raise error
        if step not in self._reasons:
            self._reasons[step] = _reason(error)
            _warn(step, error)

    def without(self, config: FastConfig) -> FastConfig:
        """A configuration that leaves out what failed."""
        fields: dict[str, Any] = {name: value for step in self._reasons for name, value in _OFF[step].items()}
        return dataclasses.replace(config, **fields)

    def draw(
        self, picture: Callable[[], T], is_first: Callable[[], bool], generator: torch.Generator | list | None
    ) -> T:
        """Draw a picture; while it fails in the code of a step of the plan, take that off and draw it anew.

        Args:
            picture: draws it.
            is_first: whether the plan has not drawn a picture yet; after that it is the call that is at fault.
            generator: of the call, which goes back to where it was.
        """
        taken_off: dict[str, Exception] = {}
        put_back = random_states(generator)
        while True:
            try:
                drawn = picture()
            except Exception as error:
                step = self.culprit(error) if is_first() else None
                if step is None:
                    # Nothing that was taken off was to blame.
                    for name in taken_off:
                        self._reasons.pop(name, None)
                    raise
                self._reasons[step], taken_off[step] = _reason(error), error
                put_back()
            else:
                for name, fault in taken_off.items():
                    _warn(name, fault)
                return drawn

    def culprit(self, error: Exception) -> str | None:
        """The step of the plan whose code, or what torch does for it, raised an error; None if it was none of them."""
        if self.strict or is_answer(error):
            return None
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            module = frame.f_globals.get("__name__", "")
            if module.partition(".")[0] == "torch":
                continue
            steps = [step for step, homes in _HOMES.items() if module.startswith(homes) and step not in self._reasons]
            return steps[0] if steps else None
        return None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect what `note_failure` is told of in this thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def note_failure(step: str, error: Exception) -> None:
    """Tell the pipeline whose call this is, if it is one, that a step of its plan failed; see `Failures.note`."""
    current = _current.get()
    if current is None:
        _warn(step, error)
    else:
        current.note(step, error)


def has_failed(step: str) -> bool:
    """Whether a step of the plan has failed in the pipeline whose call this is."""
    current = _current.get()
    return current is not None and step in current


def is_answer(error: Exception) -> bool:
    """Whether fastdiff raised an error to tell the caller what to do: that is not to be hidden."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = bool(frames) and frames[-1][0].f_globals.get("__name__", "").partition(".")[0] == __package__
    return own and isinstance(error, ValueError | TypeError | FloatingPointError)


def random_states(generator: torch.Generator | list[torch.Generator] | None) -> Callable[[], None]:
    """Remember where random generators are; the function that is returned puts them back there."""
    generators = generator if isinstance(generator, list) else [torch.default_generator, generator]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    if generator is None and torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [(each, each.get_state()) for each in torch.cuda.default_generators]

    def put_back() -> None:
        for each, state in states:
            each.set_state(state)

    return put_back


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"failed and was taken off: {type(error).__name__}: {first_line[:200]}".rstrip(": ")


def _warn(step: str, error: Exception) -> None:
    switches = ", ".join(f"{name}={value!r}" for name, value in _OFF[step].items())
    warnings.warn(
        f"fastdiff runs without {step}, which {_reason(error)}. Results are right, and may come later; "
        f"FastConfig({switches}) saves the attempt, FastConfig(strict=True) raises the error.",
        OptimizationWarning,
        stacklevel=4,
    )
