"""What makes a stock SDXL pipeline class fast: convert, apply the plan, and leave the call itself to diffusers."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from ..compiler.progress import CompileProgress
from ..config import FastConfig
from ..failures import Failures
from ..graphs import graph_pools, graphed_methods
from ..identity import StandIn
from ..lossy.loop import DenoisingLoop
from ..models.base import unwrapped
from ..models.controlnet import FastControlNetModel, fast_controlnets
from ..models.finite import FiniteCheck, NonFiniteError
from ..models.unet import FastUNet2DConditionModel
from ..plan import Plan
from ..schedulers import stock_scheduler
from ..steps import PlanStep, PlanTable, format_plan
from .components import check_components, components_state, convert_component
from .loading import FastLoadingMixin, loading_config
from .merging import MergingMixin
from .postprocess import FastImageProcessor
from .prompts import encode_together
from .saving import SavingMixin
from .warmup import WarmupMixin


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


# Methods that show the arguments of their stock class, which callers and `inspect` ask for.
_SHOWN_AS_STOCK = ("__call__", "encode_prompt", "prepare_extra_step_kwargs")


def _with_signature(method: Callable, stock: Callable) -> Callable:
    @functools.wraps(stock)
    def wrapped(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return wrapped


class FastPipelineMixin(WarmupMixin, SavingMixin, MergingMixin, FastLoadingMixin, metaclass=StandIn):
    """What every fast SDXL pipeline adds to its stock class: the `fast` argument, the plan and thread safety.

    Mixed in before a stock pipeline class, whose `__call__` runs unchanged.
    """

    image_processor: Any
    scheduler: Any

    def __init_subclass__(cls: Any, **kwargs):
        super().__init_subclass__(**kwargs)
        if FastPipelineMixin not in cls.__bases__:
            return  # a user's own subclass, whose methods are its own
        # diffusers reads the constructor's signature to tell components from options; the subclass shows that of
        # its stock class with `fast` added.
        stock_init: Any = super().__init__
        signature = inspect.signature(stock_init)
        option = inspect.Parameter(
            "fast", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="FastConfig | str | None"
        )

        @functools.wraps(stock_init)
        def __init__(self, *args, fast: FastConfig | str | None = None, **components):
            config = FastConfig.resolve(loading_config() if fast is None else fast)
            bound = signature.bind(self, *args, **components)
            check_components(type(self), bound.arguments)
            for name, component in list(bound.arguments.items()):
                bound.arguments[name] = convert_component(name, component, config)
            stock_init(*bound.args, **bound.kwargs)
            self._init_fast(config)

        parameters = [*signature.parameters.values(), option]
        __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # for `inspect`
        cls.__init__ = __init__
        for name in _SHOWN_AS_STOCK:
            stock_method = getattr(super(), name)
            setattr(cls, name, _with_signature(getattr(FastPipelineMixin, name), stock_method))

    def _init_fast(self, config: FastConfig) -> None:
        self._failures = Failures(config.strict)
        self.fast_config = config
        self._calls = _Calls()
        self._owner: weakref.ref[FastPipelineMixin] | None = None
        # Stock sets it when a call begins; a call on a view may come before the first on the pipeline itself.
        self._interrupt = False
        self._plan: list[PlanStep] = []
        self._plan_key: tuple | None = None
        self._unread: FiniteCheck | None = None
        if not config.is_off and type(self.image_processor) is VaeImageProcessor:
            self.image_processor = FastImageProcessor.from_config(self.image_processor.config)

    def __setattr__(self, name: str, value) -> None:
        # `pipe.scheduler = LCMScheduler.from_config(...)` and the like get their fast twins as in the constructor.
        if "fast_config" in self.__dict__:
            value = convert_component(name, value, self.active_config)
        super().__setattr__(name, value)

    # The plan

    @property
    def active_config(self) -> FastConfig:
        """`fast_config` without the optimisations that failed here."""
        return self._failures.without(self.fast_config)

    @property
    def plan(self) -> list[PlanStep]:
        """The ordered steps, applied on first use: `name`, `applied`, `reason`, `lossless`."""
        return PlanTable(self._apply_plan())

    def explain(self) -> str:
        """A table of what was applied on this machine, what was not, and why; applies the plan if need be."""
        steps = self._apply_plan()
        header = f"fastdiff on {self._execution_device} ({str(self.unet.dtype).removeprefix('torch.')})"
        held = sum(model.context_cache.nbytes for model in self._denoisers())
        kept = f"caches hold {held / 2**20:.1f} MiB"
        for pool in graph_pools(self._models()):
            kept += f", {len(pool)} CUDA graphs {pool.nbytes / 2**20:.1f} MiB"
        return format_plan(steps, header) + f"\n  {kept} (pipe.free_caches() frees them)"

    def free_caches(self) -> None:
        """Free cached keys, values, time embeddings and CUDA graphs. They are made again when needed."""
        self._free_graphs()
        for model in self._denoisers():
            model.free_caches()

    def to(self, *args, **kwargs):
        """As upstream. CUDA graphs, which refer to weights by their address, are freed."""
        self._free_graphs()
        return super().to(*args, **kwargs)

    def _free_graphs(self) -> None:
        for method in graphed_methods(self._models()):
            method.clear()

    def _denoisers(self) -> list[FastUNet2DConditionModel | FastControlNetModel]:
        """The fast models that run in each step; none with preset "off"."""
        models = [unwrapped(self.unet), *map(unwrapped, fast_controlnets(getattr(self, "controlnet", None)))]
        return models if isinstance(models[0], FastUNet2DConditionModel) else models[1:]

    def _models(self) -> list[torch.nn.Module]:
        """What gets compiled and recorded."""
        return [*self._denoisers(), unwrapped(self.vae)]

    def _apply_plan(self) -> list[PlanStep]:
        with self._calls.planning:
            if "host schedule" in self._failures:
                self.scheduler = stock_scheduler(self.scheduler)
            key = self._current_key()
            if self._plan_key is not None and key != self._plan_key and key[1:] == self._plan_key[1:]:
                # Another scheduler changes nothing of what was compiled and recorded.
                self._plan = self._new_plan().apply_schedule(self._plan)
                self._plan_key = key
            if self._plan_key != key:
                self._plan = self._new_plan().apply()
                self._plan_key = self._current_key()
                self._install_artifacts(self._plan)
            return self._plan

    def _current_key(self) -> tuple:
        """What the plan was made for. A pipeline that was moved, cast, offloaded, or given another component, or whose
        weights somebody asked for, gets its plan anew."""
        components = (self.scheduler, self.unet, self.vae, getattr(self, "controlnet", None))
        state = (self.unet.device, self.unet.dtype, getattr(self.unet, "revision", None), self._execution_device)
        models = (self.unet, self.vae, *fast_controlnets(getattr(self, "controlnet", None)))
        kept = components_state(unwrapped(self.unet), models)
        offloaded = hasattr(self.unet, "_diffusers_hook")
        return (*map(id, components), *state, offloaded, self._failures.steps, *kept)

    def _new_plan(self) -> Plan:
        controlnets = fast_controlnets(getattr(self, "controlnet", None))
        device = self._execution_device
        bar = getattr(self, "_progress_bar_config", {})
        return Plan(self.fast_config, self.unet, self.vae, self.scheduler, controlnets, device, self._failures, bar)

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """As upstream. Projections stay separate, and nothing is compiled or quantized any more."""
        self._new_plan().prepare_offload(fused=False)
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args, **kwargs) -> None:
        """As upstream. Projections are fused before they are moved away; nothing is compiled or quantized any more."""
        self._new_plan().prepare_offload(fused=True)
        super().enable_group_offload(*args, **kwargs)

    # The call

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        generator = kwargs.get("generator")
        return self._failures.draw(
            lambda: self._draw(*args, **kwargs), lambda: self._drawn_with != self._plan_key, generator
        )

    def _draw(self, *args, **kwargs):
        bars, watching = getattr(self, "_progress_bar_config", {}), self._failures.watching()
        # Tensors that are made in inference mode do not record edits, without which nothing computed from them is kept.
        with torch.inference_mode(False), torch.no_grad(), self._owned_call() as pipe, FiniteCheck() as check:
            with CompileProgress(bars), watching:
                output = super(FastPipelineMixin, pipe).__call__(*args, **kwargs)
            self._drawn_with = self._plan_key
            if not self.fast_config.is_off:
                self._report_non_finite(check, output[0])
            return output

    def _report_non_finite(self, check: FiniteCheck, images) -> None:
        adapters = list(getattr(self.unet, "peft_config", ()))
        previous, self._unread = self._unread, None
        if previous is not None and (reason := previous.explanation(adapters)):
            warnings.warn(f"In the previous call: {reason}", RuntimeWarning, stacklevel=3)
        if isinstance(images, torch.Tensor) and not check.has_notes:
            check.note("latents", images)
        if isinstance(images, torch.Tensor) and images.device.type != "cpu":
            # The result stays on the device: looking now would wait for it.
            self._unread = check
        elif reason := check.explanation(adapters):
            raise NonFiniteError(reason)

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
            encode, zero_for_none = super().encode_prompt, self.config.force_zeros_for_empty_prompt
            joined = None if self.fast_config.is_off else encode_together(encode, zero_for_none, args, kwargs)
            return encode(*args, **kwargs) if joined is None else joined

    def prepare_extra_step_kwargs(self, *args, **kwargs) -> dict:
        """Upstream's hook between schedule and loop: put the time embeddings of all steps on the device."""
        if self.scheduler.timesteps.device.type == "cpu":
            for model in self._denoisers():
                model.prepare_timesteps(self.scheduler.timesteps, self._execution_device, model.dtype)
        return super().prepare_extra_step_kwargs(*args, **kwargs)

    def progress_bar(self, iterable=None, total=None):
        """Upstream's hook around the loop: a bar that also tells where the loop is."""
        bar = super().progress_bar(iterable, total)
        return bar if total is None else DenoisingLoop(self, bar, total)
