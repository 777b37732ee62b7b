"""LoRA and IP-Adapter, in any order and mixed with prompt edits: always stock's picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.embedded import draw, load_fast, load_stock
from support.ip_adapters import image_embeds, make_ip_adapter
from support.loras import write_lora

LORAS = ("one", "two", "with_text")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(load_stock(), folder / name, seed=10 * index, text=name == "with_text")
        for index, name in enumerate(LORAS, start=1)
    }


def test_lora_scale_of_a_call(loras, assert_close):
    fast, stock = load_fast(), load_stock()
    for pipe in (fast, stock):
        pipe.load_lora_weights(loras["with_text"])
    pictures = []
    for scale in (1.0, 0.3, 0.0, 1.0):
        call = {"cross_attention_kwargs": {"scale": scale}}
        pictures.append(draw(stock, **call))
        assert_close(draw(fast, **call), pictures[-1])
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_scale_changed_by_a_callback(loras, assert_close):
    fast, stock = load_fast(), load_stock()

    def weaker(pipe, step, timestep, tensors):
        if step == 0:
            pipe.set_adapters(["one"], [0.2])
        return tensors

    for pipe in (fast, stock):
        pipe.load_lora_weights(loras["one"], adapter_name="one")
    expected = draw(stock, callback_on_step_end=weaker)
    assert_close(draw(fast, callback_on_step_end=weaker), expected)
    stock.set_adapters(["one"], [1.0])
    assert (draw(stock) - expected).abs().max() > 1e-3


def test_ip_adapter(assert_close):
    fast, stock = load_fast(), load_stock()
    draw(fast)
    plain = draw(stock)
    weights = make_ip_adapter(stock.unet)
    for pipe in (fast, stock):
        pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.8)
    call = {"ip_adapter_image_embeds": image_embeds()}
    expected = draw(stock, **call)
    assert (expected - plain).abs().max() > 1e-3
    assert_close(draw(fast, **call), expected)
    for pipe in (fast, stock):
        pipe.unload_ip_adapter()
    assert_close(draw(fast), plain)


class Adapters(RuleBasedStateMachine):
    """The same random operations on a stock and a fast pipeline; after each, the same picture."""

    files: dict = {}

    @initialize()
    def load(self):
        self.fast, self.stock = load_fast(), load_stock()
        self.loaded: list[str] = []
        self.fused = self.disabled = False
        self.call: dict = {}
        self.compare()

    def both(self, action) -> None:
        for pipe in (self.fast, self.stock):
            action(pipe)
        self.compare()

    def compare(self) -> None:
        expected = draw(self.stock, num_inference_steps=3, **self.call)
        assert (draw(self.fast, num_inference_steps=3, **self.call) - expected).abs().max() < 1e-4

    @precondition(lambda self: not self.fused)
    @rule(name=st.sampled_from(LORAS))
    def load_lora(self, name):
        if name in self.loaded:
            return
        self.loaded.append(name)
        self.both(lambda pipe: pipe.load_lora_weights(self.files[name], adapter_name=name))

    @precondition(lambda self: self.loaded and not self.fused)
    @rule(weights=st.lists(st.sampled_from([0.0, 0.4, 1.0, 1.3]), min_size=3, max_size=3))
    def set_adapters(self, weights):
        names = list(self.loaded)
        self.both(lambda pipe: pipe.set_adapters(names, weights[: len(names)]))

    @precondition(lambda self: self.loaded and not self.fused and not self.disabled)
    @rule(scale=st.sampled_from([0.5, 1.0]))
    def fuse(self, scale):
        self.fused = True
        self.both(lambda pipe: pipe.fuse_lora(lora_scale=scale))

    @precondition(lambda self: self.fused)
    @rule()
    def unfuse(self):
        self.fused = False
        self.both(lambda pipe: pipe.unfuse_lora())

    @precondition(lambda self: self.loaded and not self.fused)
    @rule()
    def toggle(self):
        self.disabled = not self.disabled
        self.both(lambda pipe: pipe.disable_lora() if self.disabled else pipe.enable_lora())

    @precondition(lambda self: self.loaded and not self.fused)
    @rule()
    def unload(self):
        self.loaded, self.disabled = [], False
        self.both(lambda pipe: pipe.unload_lora_weights())

    @precondition(lambda self: not self.fused)
    @rule(scale=st.sampled_from([None, 0.5, 1.0]))
    def scale_of_the_call(self, scale):
        self.call.pop("cross_attention_kwargs", None)
        if scale is not None:
            self.call["cross_attention_kwargs"] = {"scale": scale}
        self.compare()

    @rule(prompt=st.sampled_from(["a blue star", "two circles, " * 12]), guidance=st.sampled_from([1.0, 5.0]))
    def prompt(self, prompt, guidance):
        self.call |= {"prompt": prompt, "guidance_scale": guidance}
        self.compare()

    @rule(edit=st.sampled_from(["none", "in_place", "replace", "guidance_off"]))
    def edit_mid_run(self, edit):
        names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

        def change(pipe, step, timestep, tensors):
            if step != 0 or edit == "none":
                return {}
            if edit == "in_place":
                tensors["prompt_embeds"].mul_(0.6)
                return {}
            if edit == "replace":
                return {"prompt_embeds": tensors["prompt_embeds"].roll(1, dims=-1)}
            if not pipe.do_classifier_free_guidance:
                return {}
            pipe._guidance_scale = 0.0
            return {name: tensors[name].chunk(2)[-1] for name in names}

        self.call |= {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        self.compare()


def test_random_sequences_of_operations(loras):
    Adapters.files = loras
    from hypothesis.stateful import run_state_machine_as_test

    limits = settings(
        max_examples=20, stateful_step_count=8, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    with torch.random.fork_rng():
        run_state_machine_as_test(Adapters, settings=limits)


def test_an_active_lora_is_still_projected_once_a_prompt(loras):
    fast = load_fast()
    fast.load_lora_weights(loras["one"])
    calls = []
    layer = fast.unet.context_cache.layers[0].to_k
    layer.register_forward_hook(lambda *_: calls.append(1))
    draw(fast, num_inference_steps=5)
    assert len(calls) == 1
