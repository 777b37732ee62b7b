"""The components of a pipeline: which are refused, and which become fast."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from ..compiler import compiled_by_user
from ..config import FastConfig
from ..models import FastAutoencoderKL, FastUNet2DConditionModel, convert_controlnet
from ..models.base import FastModelMixin, compiled_as, prepare_compiled, unwrapped
from ..models.form import count_forms, quantized_by_hand
from ..schedulers import fast_scheduler
from ..weights import check_scheme


def check_components(pipeline_class: type, components: dict) -> None:
    """Refuse a UNet that is not SDXL's.

    Raises:
        ValueError: the UNet lacks SDXL's text-and-time conditioning.
    """
    unet = unwrapped(components.get("unet"))
    if isinstance(unet, UNet2DConditionModel) and unet.config.addition_embed_type != "text_time":
        raise ValueError(
            f"{pipeline_class.__qualname__} needs an SDXL UNet (addition_embed_type='text_time'), "
            f"not {unet.config.addition_embed_type!r}: this looks like a Stable Diffusion 1.x or 2.x model."
        )


def warn_of_mixed_dtypes(components: dict) -> None:
    """Name text encoders of another dtype than the UNet's, whose prompts the UNet cannot take, in stock as here."""
    names = ("unet", "text_encoder", "text_encoder_2")
    models = {name: components[name] for name in names if components.get(name) is not None}
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}
    if "unet" in dtypes and len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        warnings.warn(
            f"from_pipe: the models are of several dtypes ({listed}) and cannot work together. Pass torch_dtype= to "
            "from_pretrained when loading, or to from_pipe.",
            UserWarning,
            stacklevel=3,
        )


def convert_component(name: str, component, config: FastConfig):
    """Return the fast twin of a pipeline component, over the same weights, or the component itself.

    A fast model that the user has compiled stays as it is, and a stock one is compiled anew as it was. A class of the
    user's own is left alone.

    Args:
        name: the component's name in the pipeline (`"unet"`, `"vae"`, `"scheduler"`, ...).

    Raises:
        ValueError: a UNet that is already quantized with another scheme than `config` asks for.
    """
    if name == "unet" and component is not None:
        check_scheme(component, config.quantization)
    if config.is_off or component is None:
        return component
    if isinstance(unwrapped(component), FastModelMixin):
        prepare_compiled(component)
        return component
    if name == "unet" and type(unwrapped(component)) is UNet2DConditionModel:
        return compiled_as(component, FastUNet2DConditionModel.from_stock(component))
    if name == "vae" and type(component) is AutoencoderKL:
        return FastAutoencoderKL.from_stock(component)
    if name == "controlnet":
        return convert_controlnet(component)
    if name == "scheduler" and config.host_schedule:
        return fast_scheduler(component)
    return component


def components_state(unet: Any, components: tuple) -> tuple:
    """What may change about weights, or be compiled, behind the plan, which is then applied anew.

    Args:
        unet: the UNet itself.
        components: UNet, VAE and ControlNets as the pipeline has them.
    """
    is_shared = getattr(unet, "shares_weights_with", lambda: None)() is not None
    choices = tuple((compiled_by_user(component), getattr(component, "fuse_choice", None)) for component in components)
    return count_forms(unet), quantized_by_hand(unet), is_shared, choices
