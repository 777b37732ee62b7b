"""The recorder on code that waits, on code that does not, and on code that CUDA would refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.device_tensor import DeviceTensor
from support.sync_recorder import SyncRecorder


def _solve(x):
    return torch.linalg.solve(torch.eye(3, device=x.device), x)


# What is run on x = [1, 2, 3] on the device, and the names of the waits.
WAITING = {
    "item": (lambda x: x.sum().item(), ["item"]),
    "float": (lambda x: float(x[0]), ["item"]),
    "int": (lambda x: int(x[0]), ["item"]),
    "bool": (lambda x: bool((x > 0).all()), ["item"]),
    "branch": (lambda x: 1 if x[0] > 0 else 2, ["item"]),
    "chained comparison": (lambda x: 0 <= x[0] <= 2, ["item"]),
    "filter": (lambda x: list(filter(lambda element: element > 1, x)), ["item"] * 3),
    "tolist": (lambda x: x.tolist(), ["device to host"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "nonzero tuple": (lambda x: (x == 2).nonzero(as_tuple=True)[0][0], ["nonzero"]),
    "torch.nonzero": (lambda x: torch.nonzero(x), ["nonzero"]),
    "where with one argument": (lambda x: torch.where(x > 1), ["nonzero"]),
    "boolean mask": (lambda x: x[x > 1], ["mask"]),
    "boolean mask assignment": (lambda x: x.__setitem__(x > 1, torch.zeros(1, device=x.device)), ["mask"]),
    "masked_select": (lambda x: x.masked_select(x > 1), ["mask"]),
    "unique": (lambda x: torch.unique(x), ["unique"]),
    "equal": (lambda x: torch.equal(x, x.clone()), ["equal"]),
    "allclose": (lambda x: torch.allclose(x, x), ["item"]),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), ["repeat_interleave"]),
    "linalg check": (_solve, ["linalg check"]),
    "0-dim index into the device": (lambda x: x[x[0].long()], ["item"]),
    "0-dim index into the host": (lambda x: torch.arange(9)[x[0].long()], ["item"]),
    "cpu": (lambda x: x.cpu(), ["device to host"]),
    "to cpu": (lambda x: x.to("cpu"), ["device to host"]),
    "to cpu without waiting": (lambda x: x.to("cpu", non_blocking=True), ["device to host"]),
    "copy_ to the host": (lambda x: torch.zeros(3).copy_(x), ["device to host"]),
    "stream": (lambda x: torch.cuda.current_stream(x.device).synchronize(), ["synchronize"]),
    "to device": (lambda x: torch.ones(3).to(x.device), ["host to device"]),
    "to another tensor's device": (lambda x: torch.ones(3).to(x), ["host to device"]),
    "cuda": (lambda x: torch.ones(3).cuda(), ["host to device"]),
    "to device from pageable memory": (
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        ["host to device"],
    ),
    "from_numpy": (lambda x: torch.from_numpy(np.ones(3)).to(x.device), ["host to device"]),
    "copy_ from the host": (lambda x: x.clone().copy_(torch.ones(3)), ["host to device"]),
    "tensor of data": (lambda x: torch.tensor([1.0, 2.0], device=x.device), ["host to device"]),
    "index by a list": (lambda x: x[[0, 1]], ["host to device"]),
    "index by a host tensor": (lambda x: x[torch.tensor([0, 1])], ["host to device"]),
    "module": (lambda x: torch.nn.Linear(2, 2, bias=False).to(x.device), ["host to device"]),
}

NOT_WAITING = {
    "arithmetic with a host scalar": lambda x: x * torch.tensor(2.0) + 1,
    "index by an int": lambda x: x[1] + x[-1:],
    "index by a device tensor": lambda x: x[torch.arange(2, device=x.device)],
    "factories": lambda x: torch.zeros(2, device=x.device) + torch.full((2,), 3.0, device="cuda"),
    "noise": lambda x: torch.randn(3, device=x.device) + torch.randn_like(x),
    "like": lambda x: torch.zeros_like(x, device=x.device) + x.new_zeros(3),
    "dtype": lambda x: x.to(torch.bfloat16).float().to(x.device),
    "quantile": lambda x: torch.quantile(x.reshape(1, 3), 0.9, dim=1),
    "host work": lambda x: torch.arange(4)[torch.arange(4) > 2].tolist(),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.reshape(1, 1, 3, 1)] * 3),
    "in place": lambda x: x.clone().mul_(2).clamp_(0, 1),
}


@pytest.mark.parametrize("case", WAITING)
def test_finds_waits(case):
    code, expected = WAITING[case]
    with SyncRecorder() as recorder:
        code(recorder.on_device(torch.tensor([1.0, 2.0, 3.0])))
    assert [event.name for event in recorder.waits()] == expected
    assert all(event.where.startswith("tests/support/test_sync_recorder.py:") for event in recorder.events)


@pytest.mark.parametrize("case", NOT_WAITING)
def test_finds_no_wait_where_there_is_none(case):
    with SyncRecorder() as recorder:
        NOT_WAITING[case](recorder.on_device(torch.tensor([1.0, 2.0, 3.0])))
    assert recorder.events == []


def test_copy_from_pinned_memory_is_a_copy_that_does_not_wait():
    with SyncRecorder() as recorder:
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        torch.randn(3, pin_memory=True).to("cuda", non_blocking=True)
        torch.ones(3).pin_memory().to("cuda")
    assert [event.wait for event in recorder.copies()] == [False, False, True]


def test_copy_to_pinned_memory_waits_when_asked_to():
    with SyncRecorder() as recorder:
        x = recorder.on_device(torch.ones(3))
        torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
    assert [(event.name, event.wait) for event in recorder.events] == [("device to host", False), ("synchronize", True)]


def test_values_are_those_of_the_cpu():
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    expected = torch.relu(layer(x)).flatten()[3::2]
    with SyncRecorder() as recorder:
        recorder.place(layer)
        out = torch.relu(layer(x.to("cuda"))).flatten()[3::2]
        assert out.device.type == layer.weight.device.type == "cuda"
        assert isinstance(out, DeviceTensor) and torch.equal(out.cpu(), expected)


def test_shared_parameters_stay_shared():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight
    SyncRecorder.place(first, second)
    assert first.weight is second.weight and isinstance(first.weight, torch.nn.Parameter)


@pytest.mark.parametrize(
    "code",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),
        lambda x: torch.arange(9)[torch.arange(2, device=x.device)],
    ],
)
def test_refuses_what_cuda_refuses(code):
    with SyncRecorder() as recorder, pytest.raises(RuntimeError, match="same device"):
        code(recorder.on_device(torch.ones(3)))


def test_a_device_tensor_is_of_no_use_without_a_recorder():
    with pytest.raises(RuntimeError, match="outside of a SyncRecorder"):
        SyncRecorder.on_device(torch.ones(3)) + 1


def test_phases_select_events():
    with SyncRecorder() as recorder:
        x = recorder.on_device(torch.ones(3))
        recorder.phase = "loop"
        x.sum().item()
        recorder.phase = "after"
        x.cpu()
    assert [event.name for event in recorder.waits("loop")] == ["item"]
    assert [event.name for event in recorder.waits("after")] == ["device to host"]
    assert len(recorder.waits()) == 2
