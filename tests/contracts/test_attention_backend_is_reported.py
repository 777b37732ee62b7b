"""Setting an attention backend says so when no attention processor of the model can use it."""

import logging

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor
from legs import LEG, only_patched

pytestmark = only_patched


@pytest.fixture
def warnings(monkeypatch):
    """What a model's `set_attention_backend` warns of."""
    logged = []
    logger = logging.getLogger("diffusers.models.modeling_utils")
    monkeypatch.setattr(logger, "warning", lambda message, *_: logged.append(message))
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield logged
    _AttentionBackendRegistry.set_active_backend(backend)


def test_a_backend_that_reaches_no_processor_is_reported(warnings):
    unet = LEG.pipeline().unet
    unet.set_attn_processor(AttnProcessor())
    unet.set_attention_backend("native")
    assert any("no attention processor" in line and "AttnProcessor" in line for line in warnings)
