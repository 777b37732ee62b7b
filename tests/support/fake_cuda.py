"""A GPU that is not there: what is on it has a shape, a dtype and a place, and no numbers.

with FakeCuda():
    pipe = pipe.to("cuda")
    picture = pipe("a star", output_type="pt").images

What is on the CPU is real, as schedules and token numbers are. Whoever looks at a number on the device gets an error:
that would be a wait.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""


@functools.cache
def why_no_fake_cuda() -> str | None:
    """Give a build of PyTorch without CUDA a device guard that does nothing; returns why that cannot be, or None."""
    if torch.backends.cuda.is_built():
        return None
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        arguments = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        arguments.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
        try:
            subprocess.run([get_cpp_compiler(), source, *arguments, "-o", library], check=True, capture_output=True)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            return f"no device guard could be built: {error}"
        torch.ops.load_library(library)
    return None


class FakeCuda(TorchDispatchMode):
    """Context manager.

    Args:
        capability: of the device.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        super().__init__()
        self._fake, self._capability, self._stack = FakeTensorMode(allow_non_fake_inputs=True), capability, ExitStack()

    # As of torch's own modes, so that the compiler works within this one.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self):
        answers = {"is_available": True, "get_device_name": "NVIDIA H100", "get_device_capability": self._capability,
                   "_lazy_init": None, "current_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
                   "set_rng_state": None}  # fmt: skip
        for name, value in answers.items():
            self._stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value: value))
        # What convolutions of NHWC give on a GPU; without one they do not tell.
        self._stack.enter_context(
            patch.object(torch._C, "_conv_determine_backend_memory_format", lambda x, w, b: torch.channels_last)
        )
        # Tensors are made on the CPU first. What is on the device cannot take the place of real numbers in a parameter.
        for current, change in (
            (torch._C._only_lift_cpu_tensors(), torch._C._set_only_lift_cpu_tensors),
            (torch.__future__.get_overwrite_module_params_on_conversion(),
             torch.__future__.set_overwrite_module_params_on_conversion),
        ):  # fmt: skip
            change(True)
            self._stack.callback(change, current)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or leaf == CUDA or leaf == torch.device("cuda") for leaf in leaves):
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default and type(args[0]) is torch.Tensor:
            return args[0]  # from the device to the host, which keeps its numbers
        with self._fake:
            args, kwargs = tree_map_only(torch.Tensor, _without_numbers, (args, kwargs))
            result = func(*args, **kwargs)
        # Modules are moved and cast by swapping tensors, which nobody else may refer to.
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return result


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
