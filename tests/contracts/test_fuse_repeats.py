"""Fusing and unfusing can be called in any order, any number of times, and lose nothing that was set or loaded."""

import diffusers
import pytest
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from legs import LEG, draw, only_patched


@pytest.fixture(params=["unet", "vae"])
def model(request):
    return getattr(LEG.pipeline(), request.param)


@pytest.fixture
def unet():
    return LEG.pipeline().unet


def is_fused(model) -> bool:
    """Whether self-attention runs through the fused layer."""
    if LEG.patched:
        return all("Fused" in type(processor).__name__ for processor in model.attn_processors.values())
    return any(name.endswith("to_qkv") for name, _ in model.named_modules())


def load_ip_adapter(unet) -> None:
    """Processors as `load_ip_adapter` sets them, on the cross-attention layers."""
    width = unet.config.cross_attention_dim
    processors = unet.attn_processors
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            processors[f"{name}.processor"] = IPAdapterAttnProcessor2_0(layer.to_q.in_features, width)
    unet.set_attn_processor(processors)


def has_ip_adapter(unet) -> bool:
    return any(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in unet.attn_processors.values())


def test_unfuse_before_fuse_does_nothing(model):
    processors = model.attn_processors
    model.unfuse_qkv_projections()
    assert model.attn_processors == processors


@pytest.mark.parametrize("calls", ["ffu", "ffuu", "fuufu"])
def test_the_last_call_counts(model, calls):
    processors = model.attn_processors
    for call in calls:
        model.fuse_qkv_projections() if call == "f" else model.unfuse_qkv_projections()
        assert is_fused(model) == (call == "f")
    assert model.attn_processors == processors


@only_patched
def test_unfusing_frees_the_fused_layers(model):
    keys = model.state_dict().keys()
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert model.state_dict().keys() == keys


def test_a_processor_set_after_fusing_stays(unet):
    name, own = next(iter(unet.attn_processors)), AttnProcessor()
    unet.fuse_qkv_projections()
    unet.set_attn_processor({**unet.attn_processors, name: own})
    unet.unfuse_qkv_projections()
    assert unet.attn_processors[name] is own
    assert all(isinstance(p, AttnProcessor2_0) for key, p in unet.attn_processors.items() if key != name)


def test_an_ip_adapter_loaded_after_fusing_stays(unet):
    unet.fuse_qkv_projections()
    load_ip_adapter(unet)
    unet.unfuse_qkv_projections()
    assert has_ip_adapter(unet)


@only_patched
def test_fusing_does_not_replace_an_ip_adapter(unet):
    load_ip_adapter(unet)
    with pytest.raises(ValueError, match="IP-Adapter"):
        unet.fuse_qkv_projections()
    assert has_ip_adapter(unet)


@only_patched
def test_fusing_does_not_drop_a_lora(unet):
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    with pytest.raises(ValueError, match="adapter is loaded on `to_k`"):
        unet.fuse_qkv_projections()


@only_patched
def test_a_pipeline_that_is_not_fused_unfuses():
    pipe = LEG.pipeline()
    pipe.unfuse_qkv_projections()
    pipe.fuse_qkv_projections(unet=True, vae=False)
    pipe.fuse_qkv_projections(unet=False, vae=True)
    pipe.unfuse_qkv_projections()
    assert not is_fused(pipe.unet) and not is_fused(pipe.vae)


@only_patched
def test_still_draws_after_fusing_and_sequential_offload():
    """Fusing leaves all weights where accelerate looks for them."""
    from accelerate import cpu_offload

    pipe = LEG.pipeline()
    expected = draw(pipe)
    pipe.unet.fuse_qkv_projections()
    cpu_offload(pipe.unet, "cpu", offload_buffers=True)
    assert abs(draw(pipe) - expected).max() < 1e-4
    assert isinstance(pipe, diffusers.StableDiffusionXLPipeline)
