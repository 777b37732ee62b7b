"""The UNet in OpenVINO, a peer on CPUs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .settings import Settings


class _Positional(nn.Module):
    """The UNet with positional tensors only, as tracing wants it."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, context, text_embeds, time_ids):
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, context, added_cond_kwargs=added, return_dict=False)[0]


@torch.no_grad()
def run_in_openvino(unet: Any, settings: Settings) -> None:
    """Convert a UNet for the settings' size and batch, in their dtype, and put the result in place of `forward`.

    Args:
        unet: one whose `Parameter` objects nobody shares: OpenVINO's tracing converts some of them in place.
    """
    import openvino
    from openvino.frontend.pytorch.patch_model import __make_16bit_traceable
    from torch.jit._trace import TracerWarning

    from .workloads import step_inputs

    inputs = step_inputs(unet, settings)
    tensors = [inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]]
    tensors += inputs["added_cond_kwargs"].values()
    precision = {torch.bfloat16: "bf16", torch.float32: "f32"}[unet.dtype]
    if unet.dtype == torch.bfloat16:
        # Weights stay 16-bit; without this the whole UNet would have to be there in float32 once more.
        __make_16bit_traceable(unet)
    example = tuple(tensor.float() for tensor in tensors)
    with warnings.catch_warnings():
        # Sizes become constants, which is wanted: the shapes are static.
        warnings.simplefilter("ignore", TracerWarning)
        model = openvino.convert_model(_Positional(unet), example_input=example)
    model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, example, strict=True)})
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", options)

    def forward(sample, timestep, encoder_hidden_states, *, added_cond_kwargs, **kwargs) -> tuple[torch.Tensor]:
        tensors = (sample, timestep, encoder_hidden_states, *added_cond_kwargs.values())
        result = compiled([tensor.float().numpy() for tensor in tensors])[0]
        return (torch.from_numpy(result).to(sample.dtype),)

    unet.forward = forward
