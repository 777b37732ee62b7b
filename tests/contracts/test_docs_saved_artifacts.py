"""Upstream's guide says how compiled code is kept for the next process, and it works as said."""

import torch
from legs import only_patched
from test_docs_recipes import snippets

pytestmark = only_patched


def test_artifacts_are_saved_and_loaded_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts", "info"))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", saved.append)

    class Unet(torch.nn.Module):
        def forward(self, x):
            return x + 1

        def compile_repeated_blocks(self, **options):
            self.compile(backend="eager", **options)

    unet = Unet()

    class Pipeline:
        def __call__(self, prompt):
            return unet(torch.ones(2))

    Pipeline.unet = unet
    first, second = snippets("Saving compiled artifacts")
    namespace = {"torch": torch, "pipeline": Pipeline(), "prompt": ""}
    exec(first, namespace)
    exec(second, namespace)
    assert saved == [b"artifacts"]
