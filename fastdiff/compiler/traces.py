"""What the compiler found out by tracing, kept with the code that it led to, so that no region is traced again.

torch's cache artifacts save the code generator's work; tracing and its guards remain, some ten seconds for an SDXL.
torch 2.13 can also save those (`torch._dynamo.package`, which `caching_precompile` uses), if asked before it traces.
So regions are traced once more for saving, on copies of their functions. Loaded traces are tried first; a call that
their guards do not admit is compiled as usual.

Of the guards, those on the identity of functions and modules cannot be saved: code patched into a class while a
pipeline with loaded traces lives is not noticed.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .compilation import apply_compilation, undo_compilation

_log = logging.getLogger(__name__)


def record_traces(models: list[nn.Module], mode: str, call: Callable[[], object]) -> bytes | None:
    """Trace the compiled regions of some models anew.

    Args:
        models: with what `apply_compilation` put on; they keep it.
        mode: of `apply_compilation`.
        call: runs the models as they will run after loading.

    Returns:
        What `install_traces` takes, or None where torch cannot save a trace.
    """
    from torch._dynamo.package import CompilePackage
    from torch._dynamo.precompile_context import PrecompileContext

    with _kept(models), _quiet("torch._dynamo.guards"), _names_of_our_own():
        try:
            with torch._dynamo.config.patch(caching_precompile=True):
                for model in models:
                    apply_compilation(model, mode)
                functions = _functions(models)
                call()
            entries, _ = PrecompileContext.create_cache_entries()
            return pickle.dumps([entries.get(CompilePackage.source_id_from_fn(fn)) for fn in functions])
        except Exception as error:
            # An interface that torch still changes, asked only to save time: whatever fails there costs nothing else.
            _log.info("traces cannot be saved", exc_info=error)
            return None
        finally:
            PrecompileContext.clear()


def install_traces(models: list[nn.Module], data: bytes) -> None:
    """Give compiled regions that have not run yet the traces of `record_traces`, which were made by equal models.

    Args:
        data: is unpickled, so it can run code.
    """
    from torch._dynamo.package import CompilePackage

    try:
        for function, entry in zip(_functions(models), pickle.loads(data), strict=True):
            if entry is not None:
                CompilePackage(function, entry.dynamo).install(entry.backends)
                function.has_traces = True
    except Exception as error:
        _log.info("traces cannot be used", exc_info=error)


def _functions(models: Iterable[nn.Module]) -> list[Any]:
    """The functions that torch compiles, in the models' order, each under a name of its own."""
    found: dict[int, Callable] = {}
    for number, model in enumerate(models):
        for module in model.modules():
            if (method := module.__dict__.get("_compiled_method")) is None:
                continue
            bound = module.__dict__[method].__func__
            # As the method that it stands for, so that a guard can be saved which leads through the module.
            bound.__name__ = method
            compiled = getattr(bound, "compiled", bound)
            function = getattr(compiled, "_torchdynamo_orig_callable", None)
            if function is not None and id(function) not in found:
                function.__qualname__ = f"{type(module).__qualname__}.{method}@{number}.{len(found)}"
                found[id(function)] = function
    return list(found.values())


@contextmanager
def _kept(models: list[nn.Module]) -> Iterator[None]:
    """Put back what was compiled before, with its graphs."""
    modules: list[Any] = [m for model in models for m in model.modules() if "_compiled_method" in m.__dict__]
    before = [(module, module._compiled_method, module.__dict__[module._compiled_method]) for module in modules]
    try:
        yield
    finally:
        for model in models:
            undo_compilation(model)
        for module, method, function in before:
            module._compiled_method = method
            setattr(module, method, function)


@contextmanager
def _names_of_our_own() -> Iterator[None]:
    """Number the globals that traces need apart from those of all other processes.

    torch counts from 0 in every process; in the one that loads, a later trace would meet a name that is taken, and
    fail. Removable once loaded packages rename their globals.
    """
    from torch._dynamo import bytecode_transformation

    counted = bytecode_transformation._unique_id_counter
    bytecode_transformation._unique_id_counter = itertools.count(uuid.uuid4().int)
    try:
        yield
    finally:
        bytecode_transformation._unique_id_counter = counted


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger of torch from printing a line for every guard that cannot be saved."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
