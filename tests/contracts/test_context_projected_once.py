"""Keys and values of the prompt are computed once per prompt, and never served stale."""

import pytest
import torch
from legs import LEG, STEPS, draw, only_patched
from torch.overrides import TorchFunctionMode


class CountProjections(TorchFunctionMode):
    """Counts the matrix multiplications with cross-attention key and value weights."""

    def __init__(self, unet):
        super().__init__()
        names = ("attn2.to_k.weight", "attn2.to_v.weight")
        self.weights = {id(p) for name, p in unet.named_parameters() if name.endswith(names)}
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self.count += id(args[1]) in self.weights
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pipe():
    return LEG.pipeline()


@pytest.fixture(scope="module")
def prompts(pipe):
    """Prompt embeddings of one prompt and of another, (2, tokens, channels) each: negative and positive."""
    texts = "a red circle", "a blue square"
    with torch.no_grad():
        embeds = [pipe.encode_prompt(text, do_classifier_free_guidance=True) for text in texts]
    return [torch.cat([negative, positive]) for positive, negative, _, _ in embeds]


@pytest.fixture(scope="module")
def uncached(pipe, prompts):
    """What the UNet gives for the prompts when it has seen none of them before."""
    outputs = [denoise(pipe.unet, prompt.clone()) for prompt in prompts]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    return outputs


@pytest.fixture
def unet(pipe, uncached):
    if not LEG.patched:
        yield pipe.unet
        return
    LEG.cache_context(pipe.unet)
    yield pipe.unet
    pipe.unet.disable_cache()


@torch.no_grad()
def denoise(unet, prompt):
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditions = {"text_embeds": torch.ones(2, pooled), "time_ids": torch.ones(2, 6)}
    sample = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    call = {"encoder_hidden_states": prompt, "added_cond_kwargs": conditions, "return_dict": False}
    return unet(sample, torch.tensor(7.0), **call)[0]


def check_same(actual, expected):
    """Equal within rounding: fastdiff's plan may have changed the memory format since."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_picture_projects_each_layer_once(pipe, unet):
    with CountProjections(unet) as counter:
        latents = draw(pipe)
    assert counter.count == len(counter.weights) > 0
    assert torch.equal(draw(pipe), latents)


def test_still_once_a_step_without_reuse(pipe):
    if not LEG.patched:
        pipe.unet.context_cache.enabled = False
    with CountProjections(pipe.unet) as counter:
        draw(pipe)
    if not LEG.patched:
        pipe.unet.context_cache.enabled = True
    assert counter.count == STEPS * len(counter.weights)


def test_a_new_prompt_in_the_loop_is_seen(pipe, unet, prompts):
    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": prompts[1].clone()} if step == 1 else {}

    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with CountProjections(unet) as counter:
        changed = draw(pipe, **call)
    assert counter.count == 2 * len(counter.weights)
    assert not torch.equal(changed, draw(pipe))


def test_prompts_in_turn_and_edits_in_place_are_seen(unet, prompts, uncached):
    first, second = (prompt.clone() for prompt in prompts)
    for prompt, expected in [(first, 0), (first, 0), (second, 1), (first, 0)]:
        check_same(denoise(unet, prompt), uncached[expected])
    first.copy_(second)
    check_same(denoise(unet, first), uncached[1])


def test_a_prompt_in_the_memory_of_another_is_seen(unet, prompts, uncached):
    for index in (0, 1, 0, 1):
        # Freed after each call, so that the allocator may hand the same memory to the next.
        check_same(denoise(unet, prompts[index].clone()), uncached[index])


def scale_keys(unet, factor):
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_k.weight"):
                weight.mul_(factor)


def test_weights_edited_in_place_are_seen_for_the_same_prompt(unet, prompts, uncached):
    prompt = prompts[0].clone()
    check_same(denoise(unet, prompt), uncached[0])
    scale_keys(unet, 3)
    changed = denoise(unet, prompt)
    check_same(changed, denoise(unet, prompt.clone()))
    scale_keys(unet, 1 / 3)
    assert (changed - uncached[0]).abs().max() > 1e-3
    check_same(denoise(unet, prompt), uncached[0])


def test_loaded_weights_are_seen_for_the_same_prompt(unet, prompts, uncached):
    prompt = prompts[0].clone()
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    check_same(denoise(unet, prompt), uncached[0])
    unet.load_state_dict({key: value * 3 if "attn2.to_k" in key else value for key, value in state.items()})
    changed = denoise(unet, prompt)
    unet.load_state_dict(state)
    assert (changed - uncached[0]).abs().max() > 1e-3
    check_same(denoise(unet, prompt), uncached[0])


def test_a_merged_lora_is_seen_for_the_same_prompt(prompts, uncached):
    peft = pytest.importorskip("peft")
    pipe = LEG.pipeline()
    LEG.cache_context(pipe.unet)
    prompt = prompts[0].clone()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    adapted = denoise(pipe.unet, prompt)
    assert (adapted - uncached[0]).abs().max() > 1e-3
    pipe.unet.disable_adapters()
    check_same(denoise(pipe.unet, prompt), uncached[0])
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    torch.testing.assert_close(denoise(pipe.unet, prompt), adapted, rtol=0, atol=1e-3)
    pipe.unet.unfuse_lora()
    torch.testing.assert_close(denoise(pipe.unet, prompt), adapted, rtol=0, atol=1e-3)


@only_patched
def test_caches_that_need_a_transformer_are_refused(pipe):
    import diffusers

    with pytest.raises(ValueError, match="does not support FirstBlockCacheConfig"):
        pipe.unet.enable_cache(diffusers.FirstBlockCacheConfig())


@only_patched
def test_a_controlnet_projects_each_layer_once():
    import diffusers
    from stock_pipelines import call_options, stock_pipeline

    pipe = stock_pipeline("StableDiffusionXLControlNetPipeline")
    with CountProjections(pipe.controlnet) as without:
        expected = pipe(**call_options(pipe, generator=torch.Generator().manual_seed(0))).images
    pipe.controlnet.enable_cache(diffusers.TextKVCacheConfig())
    with CountProjections(pipe.controlnet) as counter:
        picture = pipe(**call_options(pipe, generator=torch.Generator().manual_seed(0))).images
    assert counter.count == len(counter.weights) == without.count / 4 > 0
    assert (picture == expected).all()


def test_new_weights_are_seen_by_the_next_picture(pipe, unet):
    expected = draw(pipe)
    weights = [p for name, p in unet.named_parameters() if name.endswith("attn2.to_k.weight")]
    for weight in weights:
        weight.data *= 3  # unlike `weight *= 3` inside `no_grad`, leaves no trace in the version counter
    changed = draw(pipe)
    for weight in weights:
        weight.data /= 3
    assert not torch.allclose(changed, expected, atol=1e-3)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
