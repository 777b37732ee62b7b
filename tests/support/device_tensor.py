"""Tensors that claim to be on `cuda:0` over values on the CPU, and the modes that run torch on them.

What CUDA would do between host and device is reported to `record(name, wait)`; what CUDA would refuse (a CPU
tensor with dimensions beside a device tensor) raises as there. Use it through `sync_recorder.SyncRecorder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

# Operators whose result, or the shape of it, the host reads before it goes on.
_WAITING_OPERATORS = {
    aten._local_scalar_dense: "item",
    aten._linalg_check_errors: "linalg check",
    aten.allclose: "item",
    aten.equal: "equal",
    aten.masked_select: "mask",
    aten.nonzero: "nonzero",
    aten.repeat_interleave: "repeat_interleave",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
}
_INDEXING_OPERATORS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside the pointwise operators, those that take a 0-dimensional CPU tensor as a plain number.
_TAKES_HOST_SCALAR = {aten.masked_fill, aten.masked_fill_, aten.fill_, aten.fill}
# They switch to the tensor's device before they dispatch, which a build without CUDA cannot. What to record:
_GUARDED_METHODS = {
    torch.Tensor.__getitem__: None,
    torch.Tensor.__setitem__: None,
    torch.Tensor.contiguous: None,
    torch.Tensor.item: "item",
    torch.Tensor.__bool__: "item",
    torch.Tensor.__float__: "item",
    torch.Tensor.__int__: "item",
    torch.Tensor.__index__: "item",
    torch.Tensor.nonzero: "nonzero",
    torch.nonzero: "nonzero",
    torch.Tensor.tolist: "device to host",
}
# They copy their data from the host; other factories fill memory on the device.
_FACTORIES_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}

# What they do goes by the device's type. Neither waits on CUDA, and the CPU's way gives the CPU's result.
_BY_DEVICE_TYPE = {
    torch.nn.functional.multi_head_attention_forward,
    torch.nn.functional.scaled_dot_product_attention,
    torch.quantile,
}

Record = Callable[[str, bool], None]


class DeviceTensor(torch.Tensor):
    """A tensor that claims to be on `cuda:0`; its values are in `host`."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a DeviceTensor outside of a SyncRecorder")


class DeviceFunctions(TorchFunctionMode):
    """Catches what torch would initialise CUDA for: whatever names the device or switches to it."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False) or func is torch.Tensor.pin_memory:
            pinned = args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs)
            pinned.claims_pinned = True
            return pinned
        if func is torch.Tensor.cuda:
            return self._to(args[0], DEVICE, **kwargs)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in _BY_DEVICE_TYPE and any_on_device(args, kwargs):
            return _all_on_device(func(*tree_map(_host, args), **tree_map(_host, kwargs)))
        if func in _GUARDED_METHODS and isinstance(args[0], DeviceTensor):
            return self._guarded(func, *args, **kwargs)
        if func is torch.Tensor.copy_ and isinstance(args[0], DeviceTensor):
            return aten.copy_(*args, **kwargs)
        if func is torch.tensor and any_on_device(args, {}):  # a list of numbers, each read from the device
            args = tree_map(lambda value: value.item() if isinstance(value, DeviceTensor) else value, args)
        if _names_device(kwargs.get("device")):
            kwargs["device"] = None
            if func in _FACTORIES_FROM_DATA and not any_on_device(args, kwargs):
                self.record("host to device", True)
            made = func(*args, **kwargs)
            return made if isinstance(made, DeviceTensor) else DeviceTensor(made)
        return func(*args, **kwargs)

    def _to(self, tensor, *args, memory_format=None, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        layout = {} if memory_format is None else {"memory_format": memory_format}
        if device is not None and not _names_device(device):
            return torch.Tensor.to(tensor, *args, copy=copy, **layout, **kwargs)
        if device is not None and not isinstance(tensor, DeviceTensor):
            self.record("host to device", not (non_blocking and _is_pinned(tensor)))
            tensor = DeviceTensor(tensor.detach().clone())
        return torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy, **layout)

    def _guarded(self, func, tensor, *args, **kwargs):
        if _GUARDED_METHODS[func] is not None:
            self.record(_GUARDED_METHODS[func], True)
        elif func is not torch.Tensor.contiguous:
            for part in args[0] if isinstance(args[0], tuple) else (args[0],):
                if isinstance(part, list) or (type(part) is torch.Tensor and part.ndim > 0):
                    self.record("host to device", True)
                elif isinstance(part, DeviceTensor) and part.dtype in (torch.bool, torch.uint8):
                    self.record("mask", True)
                elif isinstance(part, DeviceTensor) and part.ndim == 0:
                    self.record("item", True)
        result = func(tensor.host, *tree_map(_host, args), **tree_map(_host, kwargs))
        if result is tensor.host:
            return tensor
        return _all_on_device(result)


class DeviceOperators(TorchDispatchMode):
    """Runs operators on the values of device tensors."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        wrappers = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
        on_device = bool(wrappers) or _names_device(kwargs.get("device"))
        if not on_device:
            return func(*args, **kwargs)
        if func.overloadpacket is aten._to_copy:
            on_device = _names_device(kwargs.get("device", DEVICE))
        elif func.overloadpacket is aten.copy_:
            on_device = isinstance(args[0], DeviceTensor)
        else:
            _check_devices(func, leaves)
        self._record(func, args, kwargs, on_device)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        return tree_map(lambda leaf: _on_device(leaf, wrappers), result) if on_device else result

    def _record(self, func, args, kwargs, on_device: bool) -> None:
        packet = func.overloadpacket
        if not on_device:
            into_pinned = packet is aten.copy_ and args[2:3] == (True,) and _is_pinned(args[0])
            self.record("device to host", not into_pinned)
        elif packet in _WAITING_OPERATORS:
            self.record(_WAITING_OPERATORS[packet], True)
        elif packet is aten.copy_ and not isinstance(args[1], DeviceTensor) and args[1].ndim > 0:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.record("host to device", not (non_blocking and _is_pinned(args[1])))
        elif packet in _INDEXING_OPERATORS:
            for index in args[1]:
                if index is not None and not isinstance(index, DeviceTensor):
                    self.record("host to device", True)
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.record("mask", True)


def _check_devices(func, leaves: list) -> None:
    packet = func.overloadpacket
    if packet in _INDEXING_OPERATORS and isinstance(leaves[0], DeviceTensor):
        return
    takes_scalar = packet in _TAKES_HOST_SCALAR or torch.Tag.pointwise in func.tags
    for leaf in leaves:
        is_host = isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor)
        if is_host and (leaf.ndim > 0 or not takes_scalar):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got a CPU tensor of shape "
                f"{tuple(leaf.shape)} beside tensors on {DEVICE}."
            )


def _on_device(leaf: Any, wrappers: dict[int, DeviceTensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    wrapper = wrappers.get(id(leaf))
    if wrapper is None:
        return DeviceTensor(leaf)
    if wrapper.shape != leaf.shape:
        raise NotImplementedError("an operator changed the shape of a device tensor in place")
    return wrapper


def any_on_device(*trees: Any) -> bool:
    """Whether anything in the arguments is a `DeviceTensor`."""
    return any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves(trees))


def _all_on_device(result: Any) -> Any:
    return tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _names_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _is_pinned(tensor: torch.Tensor) -> bool:
    # From pageable memory even a non-blocking copy may wait for the stream.
    return getattr(tensor, "claims_pinned", False)


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, DeviceTensor) else leaf
