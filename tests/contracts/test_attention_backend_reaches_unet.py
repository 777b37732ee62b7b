"""The attention backend that is set on a UNet computes the attention of all its layers, and of no other model."""

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from legs import LEG, STEPS, draw, only_patched

pytestmark = only_patched
BACKEND = AttentionBackendName._NATIVE_MATH


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with each call of the backend."""
    counted = []
    function = _AttentionBackendRegistry._backends[BACKEND]
    counting = lambda *args, **kwargs: counted.append(1) or function(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, BACKEND, counting)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    yield counted
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("fused", [False, True])
def test_the_backend_reaches_every_layer_of_the_unet(calls, fused):
    pipe = LEG.pipeline()
    if fused:
        pipe.fuse_qkv_projections()
    expected = draw(pipe, output_type="np")
    pipe.unet.set_attention_backend(BACKEND.value)
    assert abs(draw(pipe, output_type="np") - expected).max() < 1e-4
    assert len(calls) == STEPS * len(pipe.unet.attn_processors)


def test_still_no_backend_where_none_is_set(calls):
    """The VAE's heads are too wide for most kernels: a backend of another model is not for it."""
    pipe = LEG.pipeline()
    _AttentionBackendRegistry.set_active_backend(BACKEND)
    draw(pipe, output_type="np")
    assert calls == []
