"""The recipe for dynamic quantization in upstream's guide runs."""

import re
from pathlib import Path

import pytest
import torch
from legs import _TREE, CHECKPOINT, only_patched

GUIDE = Path(_TREE or ".") / "docs" / "source" / "en" / "optimization" / "fp16.md"

pytestmark = only_patched


def snippets(heading: str) -> list[str]:
    """The Python of a section, with the embedded checkpoint on the CPU in place of SDXL on a GPU."""
    section = GUIDE.read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    section = re.split(r"^##", section, flags=re.MULTILINE)[0]
    code = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    return [
        c.replace('"stabilityai/stable-diffusion-xl-base-1.0"', repr(str(CHECKPOINT))).replace('.to("cuda")', "")
        for c in code
    ]


@pytest.fixture(autouse=True)
def settings():
    """The compiler's settings are put back."""
    saved = torch._inductor.config.save_config()
    yield
    torch._inductor.config.load_config(saved)


def test_the_quantization_recipe_runs():
    namespace: dict = {}
    code = "".join(snippets("Dynamic quantization"))
    code = code.replace("num_inference_steps=30", "num_inference_steps=1, height=64, width=64")
    code = code.replace("fullgraph=True)", 'fullgraph=True, backend="eager")').replace(">= 640", ">= 64")
    exec(code, namespace)
    quantized = [m for m in namespace["pipeline"].unet.modules() if "Int8" in type(getattr(m, "weight", None)).__name__]
    assert quantized
