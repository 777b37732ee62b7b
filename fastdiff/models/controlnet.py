"""`FastControlNetModel`: the stock ControlNet with work that does not change between steps taken out of the step."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from ..identity import stands_in_for
from .attention import convert_attention
from .context import attach_context_cache
from .conversion import share_weights
from .processor import FusedQKVAttnProcessor
from .projections import FusedProjectionsMixin

_MAX_SHAPES, _MAX_TIMESTEPS = 16, 4096


class ControlNetResiduals(NamedTuple):
    """What the fast ControlNet returns: a tuple of two, whose elements also go by their stock names."""

    down_block_res_samples: list[torch.Tensor]
    mid_block_res_sample: torch.Tensor


@stands_in_for(ControlNetModel)
class FastControlNetModel(FusedProjectionsMixin, ControlNetModel):
    """A ControlNet for SDXL, equal to the stock one within rounding. Made with `from_stock`.

    Three things leave the step: keys and values of the prompt (a context cache of its own), the copy of the timestep
    to the device, and all of it in the steps before `control_guidance_start` and after `control_guidance_end`, in
    which stock multiplies the result by zero. `forward` returns a tuple by default; `return_dict=True` gives the
    stock output object. Weights, state-dict keys and `save_pretrained` are those of `ControlNetModel`.
    """

    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D", "Downsample2D"]

    @classmethod
    def from_stock(cls, controlnet: ControlNetModel) -> FastControlNetModel:
        """Make a fast ControlNet over the weights of a stock one: the same storages, no copy.

        Raises:
            TypeError: if `controlnet` is no `ControlNetModel`.
        """
        if isinstance(controlnet, cls):
            return controlnet
        fast = share_weights(controlnet, ControlNetModel, cls)
        convert_attention(fast, FusedQKVAttnProcessor())
        fast.context_cache = attach_context_cache(fast)
        fast._timesteps, fast._silent_shapes = {}, OrderedDict()
        return fast

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> FastControlNetModel:
        """Load a ControlNet as the stock class does, and make it fast."""
        return cls.from_stock(ControlNetModel.from_pretrained(*args, **kwargs))

    @classmethod
    def from_unet(cls, unet, *args, **kwargs) -> FastControlNetModel:
        """As upstream: a new ControlNet with the weights of a UNet's encoder."""
        return cls.from_stock(ControlNetModel.from_unet(unet, *args, **kwargs))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        *args,
        return_dict: bool = False,
        **kwargs,
    ) -> ControlNetResiduals | ControlNetOutput:
        """Compute the residuals for the UNet. Arguments and meaning as in `ControlNetModel.forward`.

        Args:
            sample: latents, (batch, channels, height, width).
            controlnet_cond: the control image, (batch, 3, 8 * height, 8 * width).
            conditioning_scale: factor of the residuals. With 0.0 they are zeros and nothing is computed.
            return_dict: False returns a tuple, True the stock output object.
        """
        kind = (sample.shape, sample.dtype, sample.device)
        if conditioning_scale == 0.0 and kind in self._silent_shapes:
            down, mid = self._silence(kind)
        else:
            context = encoder_hidden_states
            if self.config.addition_embed_type in (None, "text_time"):
                context = self.context_cache.project(context)
            timestep = self._on_device(timestep, sample.device)
            # The scale is no part of the graph: its value would be compiled in.
            inputs = (sample, timestep, context, controlnet_cond, 1.0, *args)
            down, mid = self.condition(*inputs, return_dict=False, **kwargs)
            if conditioning_scale != 1.0:
                down, mid = [residual * conditioning_scale for residual in down], mid * conditioning_scale
            self._remember_shapes(kind, [*down, mid])
        result = ControlNetResiduals(list(down), mid)
        return ControlNetOutput(*result) if return_dict else result

    def condition(self, *args, **kwargs) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The part of `forward` that runs on the device alone: what full-graph compilation takes."""
        return super().forward(*args, **kwargs)

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
    component = getattr(component, "_orig_mod", component)
    return FastControlNetModel.from_stock(component) if type(component) is ControlNetModel else component


def fast_controlnets(component) -> list[FastControlNetModel]:
    """The fast ControlNets in a pipeline's `controlnet` component, which may be None."""
    nets = component.nets if isinstance(component, MultiControlNetModel) else [component]
    return [net for net in nets if isinstance(net, FastControlNetModel)]
