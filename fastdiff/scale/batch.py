"""A batch job: rows through Ray Data, one warm pipeline per actor, pictures and manifest in one folder."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version

import ray.data
from ray.exceptions import RayError
from tqdm.auto import tqdm

from .. import __version__
from .artist import Artist, ModelChoice, png_bytes
from .folder import OutputFolder
from .requests import RowRequest
from .rows import Row

_MOST_BLOCKS = 4096
_LIBRARIES = ("torch", "diffusers", "ray")


class _BatchActor:
    """What runs in each actor: rows in, pictures out, each row alone in its call."""

    def __init__(self, choice: ModelChoice):
        self._artist = Artist(choice)

    def __call__(self, item: dict) -> dict:
        request = RowRequest.model_validate_json(item["request"])
        width, height = self._artist.size(request)
        answer = {"key": item["key"], "png": b"", "error": "", "size": f"{width}x{height}", "tuning": ""}
        started = time.perf_counter()
        try:
            self._artist.use_loras(request.loras)
            [picture] = self._artist.draw([request])
            answer["png"] = png_bytes(picture)
        except Exception as error:  # One bad row, a picture too large for the device, must not end the job.
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        answer["seconds"] = round(time.perf_counter() - started, 4)
        answer["tuning"] = self._artist.tuning() or ""
        return answer


def run_batch(
    rows: list[Row], folder: OutputFolder, choice: ModelChoice, replicas: int, reserved: dict
) -> int:
    """Draw the rows that the folder does not hold yet, with a progress bar; Ray must be running.

    The process that calls this is the only one that writes, so workers need no file system in common, and a
    row that an actor drew twice because the first try was lost is still written once.

    Args:
        rows: of the prompts file.
        folder: where pictures go.
        choice: what each actor loads.
        replicas: actors.
        reserved: Ray resources of each actor.

    Returns:
        How many rows are still not done; stderr says why.
    """
    left = {row.key: row for row in rows if row.key not in folder.done}
    bar = tqdm(total=len(rows), initial=len(rows) - len(left), desc="batch", unit="image", smoothing=0.1)
    try:
        for answer in _answers(list(left.values()), choice, replicas, reserved) if left else ():
            row = left[answer["key"]]
            if answer["error"]:
                bar.write(f"line {row.number} failed: {answer['error']}", file=sys.stderr)
                continue
            folder.add(_manifest_line(row, answer, choice), answer["png"])
            del left[row.key]
            bar.update()
    except RayError as error:
        bar.write(f"the workers stopped: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    finally:
        bar.close()
    return len(left)


def _answers(rows: list[Row], choice: ModelChoice, replicas: int, reserved: dict) -> Iterator[dict]:
    """Stream the answers of a pool of actors, in the order in which they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"key": row.key, "request": row.request.model_dump_json()} for row in rows]
    # Small blocks: what comes out of a block is handed over, and lost with a killed actor, as a whole.
    data = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
    # Ray Data restarts an actor that dies and repeats its rows, without limit.
    drawn = data.map(
        _BatchActor,
        fn_constructor_args=[choice],
        compute=ray.data.ActorPoolStrategy(size=replicas),
        **reserved,
    )
    yield from drawn.iter_rows()


def _manifest_line(row: Row, answer: dict, choice: ModelChoice) -> dict:
    return {
        "key": row.key,
        "file": row.file_name,
        "row": row.number,
        **row.request.model_dump(exclude={"lora"}),
        "size": answer["size"],
        "model": choice.model or "embedded",
        "loras": [list(lora) for lora in (*choice.loras, *row.request.loras)],
        "preset": choice.preset,
        **dict(choice.switches),
        "dtype": choice.dtype or "auto",
        "device": choice.device,
        "threads": choice.threads,
        "tuning": answer["tuning"] or None,
        "versions": {"fastdiff": __version__, **{name: version(name) for name in _LIBRARIES}},
        "seconds": answer["seconds"],
        "finished": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "sha256": hashlib.sha256(answer["png"]).hexdigest(),
    }
