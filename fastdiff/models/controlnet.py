"""`FastControlNetModel`: the stock ControlNet with work that does not change between steps taken out of the step."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from ..identity import stands_in_for
from .base import FastModelMixin, compiled_as, hoist, prepare_compiled, unwrapped
from .context import ContextCache, attach_context_cache
from .conversion import share_weights
from .outputs import answers_by_name

_MAX_SHAPES, _MAX_TIMESTEPS = 16, 4096


@answers_by_name
class ControlNetResiduals(NamedTuple):
    """What the fast ControlNet returns: a tuple of two, whose elements also go by their stock names."""

    down_block_res_samples: list[torch.Tensor]
    mid_block_res_sample: torch.Tensor


@stands_in_for(ControlNetModel)
class FastControlNetModel(FastModelMixin, ControlNetModel):
    """A ControlNet for SDXL, equal to the stock one within rounding; made as a stock one is, or with `from_stock`.

    Three things leave the step: keys and values of the prompt (a context cache of its own), the copy of the timestep
    to the device, and all of it in the steps before `control_guidance_start` and after `control_guidance_end`, in
    which stock multiplies the result by zero. `forward` returns a tuple by default; `return_dict=True` gives the
    stock output object. Weights, state-dict keys and `save_pretrained` are those of `ControlNetModel`.
    """

    _repeated_blocks = ["BasicTransformerBlock"]
    _regions = ("BasicTransformerBlock", "ResnetBlock2D", "Downsample2D")

    @functools.wraps(ControlNetModel.__init__)  # type: ignore[misc]  # for `inspect`, which diffusers asks
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_fast()

    @classmethod
    def from_stock(cls, controlnet: ControlNetModel) -> FastControlNetModel:
        """Make a fast ControlNet over the weights of a stock one: the same storages, no copy.

        Raises:
            TypeError: if `controlnet` is no `ControlNetModel`.
        """
        if isinstance(controlnet, cls):
            return controlnet
        fast = share_weights(controlnet, ControlNetModel, cls)
        fast._make_fast()
        return fast

    def _make_fast(self) -> None:
        super()._make_fast()
        self.context_cache: ContextCache = attach_context_cache(self)
        self._timesteps: dict[tuple, torch.Tensor] = {}
        self._silent_shapes: OrderedDict[tuple, list[tuple]] = OrderedDict()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = False,
    ) -> ControlNetResiduals | ControlNetOutput:
        """Compute the residuals for the UNet. Arguments and meaning as in `ControlNetModel.forward`.

        Args:
            sample: latents, (batch, channels, height, width).
            controlnet_cond: the control image, (batch, 3, 8 * height, 8 * width).
            conditioning_scale: factor of the residuals. With 0.0 they are zeros and nothing is computed.
            return_dict: False returns a tuple, True the stock output object.
        """
        rest = (class_labels, timestep_cond, attention_mask, added_cond_kwargs, cross_attention_kwargs, guess_mode)
        if torch.compiler.is_compiling():
            inputs = (sample, timestep, encoder_hidden_states, controlnet_cond)
            down, mid = self.condition(*inputs, conditioning_scale, *rest, return_dict=False)
        else:
            inputs = (sample, *self._hoisted(sample, timestep, encoder_hidden_states), controlnet_cond)
            down, mid = self._residuals(inputs, conditioning_scale, rest)
        result = ControlNetResiduals(list(down), mid)
        return ControlNetOutput(*result) if return_dict else result

    def _residuals(self, inputs: tuple, scale: float, rest: tuple) -> tuple[list[torch.Tensor], torch.Tensor]:
        sample = inputs[0]
        kind = (sample.shape, sample.dtype, sample.device)
        if scale == 0.0 and kind in self._silent_shapes:
            return self._silence(kind)
        # The scale is no part of the graph: its value would be compiled in.
        down, mid = self.condition(*inputs, 1.0, *rest, return_dict=False)
        if scale != 1.0:
            down, mid = [residual * scale for residual in down], mid * scale
        self._remember_shapes(kind, [*down, mid])
        return down, mid

    def _hoisted(self, sample: torch.Tensor, timestep: Any, context: Any) -> tuple[Any, Any]:
        """Timestep and context of a call, looked up."""
        if self.config.addition_embed_type in (None, "text_time"):
            context = self.context_cache.project(context)
        return self._on_device(timestep, sample.device), context

    def prepare_call(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the timestep and the context by what is looked up, outside of compiled code."""
        if torch.compiler.is_compiling() or not self.has_own_forward():
            return args, kwargs
        return hoist(self._hoisted, args, kwargs)

    def condition(self, *args, **kwargs) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The part of `forward` that runs on the device alone: what full-graph compilation takes."""
        return super().forward(*args, **kwargs)

    def has_own_forward(self) -> bool:
        """False where a subclass, or something that was put on this object, takes the arguments."""
        return type(self).forward is FastControlNetModel.forward and "forward" not in self.__dict__

    def prepare_timesteps(self, timesteps: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Put the timesteps of a schedule on the device before the loop, in one copy.

        Args:
            timesteps: (steps,), on the CPU.
            device: where the latents are.
            dtype: as for the UNet; the ControlNet takes the timesteps as they are.
        """
        steps = timesteps.tolist()
        if all((step, device) in self._timesteps for step in steps):
            return
        if len(self._timesteps) > _MAX_TIMESTEPS:
            self._timesteps.clear()
        rows = timesteps.to(device).split(1)
        self._timesteps.update({(step, device): row for step, row in zip(steps, rows, strict=True)})

    def free_caches(self) -> None:
        """Free the cached keys and values and the timesteps; they are made again when needed."""
        self.context_cache.clear()
        self._timesteps.clear()

    def _on_device(self, timestep: torch.Tensor | float | int, device: torch.device) -> torch.Tensor | float | int:
        if isinstance(timestep, torch.Tensor) and timestep.ndim == 0 and timestep.device.type == "cpu":
            return self._timesteps.get((timestep.item(), device), timestep)
        return timestep

    def _remember_shapes(self, kind: tuple, residuals: list[torch.Tensor]) -> None:
        self._silent_shapes[kind] = [(residual.shape, residual.stride(), residual.dtype) for residual in residuals]
        while len(self._silent_shapes) > _MAX_SHAPES:
            self._silent_shapes.popitem(last=False)

    def _silence(self, kind: tuple) -> tuple[list[torch.Tensor], torch.Tensor]:
        # Strides as in the steps that compute, so that a compiled UNet does not see another layout.
        zeros = [
            torch.empty_strided(shape, stride, dtype=dtype, device=kind[2]).zero_()
            for shape, stride, dtype in self._silent_shapes[kind]
        ]
        return zeros[:-1], zeros[-1]

    def _after_layer_change(self) -> None:
        super()._after_layer_change()
        self.context_cache.clear()

    def _apply(self, fn, recurse: bool = True):
        self.context_cache.clear()
        return super()._apply(fn, recurse)


def convert_controlnet(component):
    """Make the ControlNet of a pipeline fast: a model, a list of models, or a `MultiControlNetModel`.

    Models of other classes are returned as they are; they keep working as in stock.
    """
    if isinstance(component, list | tuple):
        return [convert_controlnet(net) for net in component]
    if type(component) is MultiControlNetModel:
        nets = [convert_controlnet(net) for net in component.nets]
        return component if nets == list(component.nets) else MultiControlNetModel(nets)
    if type(unwrapped(component)) is not ControlNetModel:
        prepare_compiled(component)
        return component
    return compiled_as(component, FastControlNetModel.from_stock(component))


def fast_controlnets(component) -> list[FastControlNetModel]:
    """The fast ControlNets in a pipeline's `controlnet` component, which may be None, compiled as they are."""
    nets = component.nets if isinstance(component, MultiControlNetModel) else [component]
    return [net for net in nets if isinstance(unwrapped(net), FastControlNetModel)]
