"""What makes a stock SDXL pipeline class fast: convert, apply the plan, and leave the call itself to diffusers."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from . import checkpoints
from .config import FastConfig
from .loading import FastLoadingMixin
from .plan import Plan, PlanStep, convert_component, format_plan


class _Calls:
    """The locks of a pipeline. A copied or unpickled pipeline gets locks of its own."""

    def __init__(self):
        self.running = threading.Lock()
        self.planning = threading.RLock()
        self.encoding = threading.RLock()

    def __deepcopy__(self, memo: dict) -> _Calls:
        return _Calls()

    def __reduce__(self):
        return _Calls, ()


class FastPipelineMixin(FastLoadingMixin):
    """What every fast SDXL pipeline adds to its stock class: the `fast` argument, the plan and thread safety.

    Mixed in before a stock pipeline class, whose `__call__` runs unchanged.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # diffusers reads the constructor's signature to tell components from options; the subclass shows that of
        # its stock class with `fast` added.
        stock_init = next(base.__init__ for base in cls.__mro__[1:] if not issubclass(FastPipelineMixin, base))
        signature = inspect.signature(stock_init)
        option = inspect.Parameter(
            "fast", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="FastConfig | str | None"
        )

        @functools.wraps(stock_init)
        def __init__(self, *args, fast: FastConfig | str | None = None, **components):
            config = FastConfig.resolve(fast)
            bound = signature.bind(self, *args, **components)
            checkpoints.check_components(type(self), bound.arguments)
            for name, component in list(bound.arguments.items()):
                bound.arguments[name] = convert_component(name, component, config)
            stock_init(*bound.args, **bound.kwargs)
            self._init_fast(config)

        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
        cls.__init__ = __init__

    def _init_fast(self, config: FastConfig) -> None:
        self.fast_config = config
        self._calls = _Calls()
        self._owner = None
        self._plan: list[PlanStep] | None = None
        self._plan_key: tuple | None = None

    # The plan

    @property
    def plan(self) -> list[PlanStep]:
        """The ordered steps, applied on first use: `name`, `applied`, `reason`, `lossless`."""
        return list(self._apply_plan())

    def explain(self) -> str:
        """A table of what was applied on this machine, what was not, and why; applies the plan if need be."""
        steps = self._apply_plan()
        header = f"fastdiff on {self.unet.device} ({str(self.unet.dtype).removeprefix('torch.')})"
        held = self.unet.context_cache.nbytes if hasattr(self.unet, "context_cache") else 0
        return format_plan(steps, header) + f"\n  caches hold {held / 2**20:.1f} MiB (pipe.free_caches() frees them)"

    def warmup(
        self, sizes: Iterable[tuple[int, int]] = ((1024, 1024),), batch_sizes: Iterable[int] = (1,), **kwargs
    ) -> None:
        """Compile and fill caches ahead of the first request, with a progress bar.

        Args:
            sizes: (width, height) in pixels.
            batch_sizes: images per call.
            kwargs: passed on to the call, for example `guidance_scale`.
        """
        combinations = [(w, h, n) for w, h in sizes for n in batch_sizes]
        self._apply_plan()
        shown = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**{**shown, "disable": True})
        try:
            for width, height, batch in tqdm(combinations, desc="warm-up", unit="size", disable=shown.get("disable")):
                self(
                    prompt=["warm-up"] * batch, width=width, height=height, num_inference_steps=2, output_type="pt",
                    **kwargs,
                )
        finally:
            self._progress_bar_config = shown

    def free_caches(self) -> None:
        """Free cached keys, values and time embeddings. They are made again when needed."""
        if hasattr(self.unet, "free_caches"):
            self.unet.free_caches()

    def _apply_plan(self) -> list[PlanStep]:
        with self._calls.planning:
            # A pipeline that was moved, cast, or given another component gets its plan anew.
            components = (id(self.unet), id(self.vae), id(self.scheduler))
            key = (self.unet.device, self.unet.dtype, getattr(self.unet, "revision", None), *components)
            if self._plan_key != key:
                self._plan = Plan(self.fast_config, self.unet, self.vae, self.scheduler).apply()
                self._plan_key = key
            return self._plan

    # The call

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        with self._owned_call() as pipe:
            if hasattr(pipe.unet, "context_cache"):
                # Between calls weights may change in ways that no tensor records; within one they may not.
                pipe.unet.context_cache.invalidate()
            return super(FastPipelineMixin, pipe).__call__(*args, **kwargs)

    @contextmanager
    def _owned_call(self):
        """Give a call a pipeline whose state is its own.

        The first call runs on the pipeline itself, as in stock. Calls that overlap it run on a view: the same
        components, with a scheduler and guidance settings of their own.
        """
        self._apply_plan()
        if self._calls.running.acquire(blocking=False):
            try:
                yield self
            finally:
                self._calls.running.release()
            return
        view = copy.copy(self)
        view._owner, view._interrupt = weakref.ref(self), False
        view.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        yield view

    @property
    def interrupt(self) -> bool:
        """True once somebody has set `_interrupt`, on the pipeline or on this call's view of it."""
        owner = self._owner() if self._owner is not None else None
        return self._interrupt or (owner is not None and owner._interrupt)

    def encode_prompt(self, *args, **kwargs):
        """As upstream, one call at a time: tokenizers keep padding and truncation as state of their own."""
        with self._calls.encoding:
            return super().encode_prompt(*args, **kwargs)

    def prepare_extra_step_kwargs(self, *args, **kwargs) -> dict:
        """Upstream's hook between schedule and loop: put the time embeddings of all steps on the device."""
        if hasattr(self.unet, "prepare_timesteps") and self.scheduler.timesteps.device.type == "cpu":
            self.unet.prepare_timesteps(self.scheduler.timesteps, self._execution_device, self.unet.dtype)
        return super().prepare_extra_step_kwargs(*args, **kwargs)
