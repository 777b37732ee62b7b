"""Which offloading moves a model's weights, as far as the plan has to know."""

from __future__ import annotations

from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn


def inner_offloading(model: nn.Module) -> str | None:
    """The offloading that moves single layers of a model in and out of the device, or None.

    `enable_model_cpu_offload` moves models as a whole and counts as None.

    Returns:
        `"sequential offload"`, `"group offload"` or None.
    """
    if _is_group_offload_enabled(model):
        return "group offload"
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return "sequential offload" if any(getattr(hook, "offload", False) for hook in hooks) else None


def clear_left_forwards(model: nn.Module) -> None:
    """Take off what accelerate leaves where its hooks were removed: the class's own `forward`, as an attribute.

    It would stand before the `forward` of the forms that layers take. Removable once accelerate deletes it.
    """
    for module in model.modules():
        left = module.__dict__.get("forward")
        if left is not None and getattr(left, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
