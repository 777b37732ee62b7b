"""The compiler: which regions become graphs, with which options, and how compiled code is saved and shown.

May import `models`.
"""

from .artifacts import Artifacts, artifact_key, read_artifacts, save_artifacts
from .compilation import (
    CompileChoice,
    apply_compilation,
    choose_compile,
    compiled_by_user,
    expect_new_graphs,
    undo_compilation,
)
from .progress import CompileProgress
from .traces import record_traces

__all__ = [
    "Artifacts",
    "CompileChoice",
    "CompileProgress",
    "apply_compilation",
    "artifact_key",
    "choose_compile",
    "compiled_by_user",
    "expect_new_graphs",
    "read_artifacts",
    "record_traces",
    "save_artifacts",
    "undo_compilation",
]
