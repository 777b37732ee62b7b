"""Whether a model is where its name says, asked before the libraries that load it are imported."""

from __future__ import annotations

import os
import threading

from ..checkpoint import check_folder, is_model_id
from ..errors import UsageError

_SECONDS = 4.0
_INDEX = "model_index.json"


def check_model(name: str | os.PathLike) -> bool:
    """Look for a model: its directory here, or its entry in the hub.

    Returns:
        Whether the hub can be asked for files; False where only what it gave earlier is at hand.

    Raises:
        UsageError: there is no such model, or the hub does not answer and has given nothing earlier.
    """
    if not is_model_id(name):
        try:
            check_folder(name)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
        return True
    from huggingface_hub import constants, try_to_load_from_cache

    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _ask(str(name))
    if problem is None:
        return True
    if isinstance(try_to_load_from_cache(str(name), _INDEX), str):
        return False
    raise UsageError(
        f"--model {name}: no such directory here, and the hub, {constants.ENDPOINT}, cannot be reached: {problem}"
    )


def _ask(name: str) -> str | None:
    """Ask the hub for a model; returns why it does not answer, or None.

    Raises:
        UsageError: it says that there is no such model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=_SECONDS)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread, as a name server that does not answer knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    if not outcome:
        return f"no answer within {_SECONDS:g} s"
    error = outcome[0]
    if isinstance(error, GatedRepoError):
        raise UsageError(f"--model {name}: accept the model's terms on its page, and log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        raise UsageError(
            f"--model {name}: there is no such directory here and no such model on the hub, or it is private "
            "(`hf auth login`)"
        )
    return None if error is None else str(error) or type(error).__name__
