"""Classifier-free guidance and the step as one compiled region."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from support.scheduler_runs import SHAPE, eight, fast_of, linear_options, model, noise, takes
from torch._dynamo.utils import counters

from fastdiff.schedulers import guided_step

STEPS = 30
BRANCHES = [
    (DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, {}),
    (UniPCMultistepScheduler, {"solver_order": 3, "disable_corrector": [0]}, {}),
    (EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, {"s_churn": 5.0}),
    (DDIMScheduler, {"clip_sample": False}, {"eta": 0.5}),
    (TCDScheduler, {}, {"eta": 0.7}),
    (HeunDiscreteScheduler, {"use_exponential_sigmas": True}, {}),
]


def guided(predict, scale: float, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's output for both halves of the batch, and the two combined as the pipeline does."""
    unconditional, conditional = predict(sample), predict(sample + 0.1)
    return torch.cat([unconditional, conditional]), unconditional + scale * (conditional - unconditional)


def run_stock(scheduler, scale: float, dtype, **step_kwargs) -> torch.Tensor:
    scheduler.set_timesteps(STEPS)
    if takes(scheduler, "step", "generator"):
        step_kwargs["generator"] = torch.Generator().manual_seed(1)
    sample = (noise(*SHAPE) * scheduler.init_noise_sigma).to(dtype)
    for timestep in scheduler.timesteps:
        _, output = guided(model, scale, scheduler.scale_model_input(sample, timestep))
        sample = scheduler.step(output, timestep, sample, **step_kwargs, return_dict=False)[0]
    return sample


def run_guided_step(scheduler, scale: float, dtype, step=guided_step, **step_kwargs) -> torch.Tensor:
    scheduler.set_timesteps(STEPS)
    plan = scheduler.step_weights(**step_kwargs)
    assert scheduler.__dict__.get("_step_index") is None, "planning must leave the scheduler as it was"
    generator, scale = torch.Generator().manual_seed(1), torch.tensor(scale)
    draws = sum(bool(weights.noise) for weights in plan)
    sample = (noise(*SHAPE) * scheduler.init_noise_sigma).to(dtype)
    history, fresh = plan[0].empty_history(sample), torch.zeros_like(sample) if draws else None
    for index, (timestep, weights) in enumerate(zip(scheduler.timesteps, plan, strict=True)):
        scheduler.set_begin_index(index) if hasattr(scheduler, "set_begin_index") else None
        scheduler._step_index = None
        both, _ = guided(model, float(scale), scheduler.scale_model_input(sample, timestep))
        if weights.noise:
            fresh = torch.randn(SHAPE, generator=generator, dtype=dtype)
        sample, history = step(both, scale, sample, weights, history, fresh)
    return sample


def check_one_graph(fast, scale: float, **step_kwargs) -> torch.Tensor:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample = run_guided_step(fast, scale, torch.float32, compiled, **step_kwargs)
        run_guided_step(fast, scale + 1, torch.float32, compiled, **step_kwargs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    return sample


@eight
def test_one_graph_for_all_steps_and_the_samples_of_stock(stock_class):
    options = linear_options(stock_class)
    expected = run_stock(stock_class(**options), 5.0, torch.float32)
    sample = check_one_graph(fast_of(stock_class)(**options), 5.0)
    assert (sample - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("stock_class", "options", "step_kwargs"), BRANCHES)
def test_one_graph_for_orders_and_noise(stock_class, options, step_kwargs):
    expected = run_stock(stock_class(**options), 5.0, torch.float32, **step_kwargs)
    sample = check_one_graph(fast_of(stock_class)(**options), 5.0, **step_kwargs)
    assert (sample - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_inductor_compiles_it_once():
    torch._dynamo.reset()
    counters.clear()
    fast = fast_of(DPMSolverMultistepScheduler)()
    expected = run_guided_step(fast, 5.0, torch.float32)
    compiled = torch.compile(guided_step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample = run_guided_step(fast, 5.0, torch.float32, compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert (sample - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_result_has_the_dtype_of_the_model_and_history_is_exact():
    fast = fast_of(DPMSolverMultistepScheduler)()
    fast.set_timesteps(STEPS)
    weights = fast.step_weights()[0]
    x = noise(*SHAPE).bfloat16()
    sample, history = guided_step(torch.cat([x, x]), 5.0, x, weights, weights.empty_history(x))
    assert sample.dtype == torch.bfloat16 and {kept.dtype for kept in history} == {torch.float32}


def test_weights_of_the_rest_of_a_schedule():
    fast = fast_of(EulerDiscreteScheduler)()
    fast.set_timesteps(10)
    every = fast.step_weights()
    fast.set_begin_index(4)
    rest = fast.step_weights()
    assert [len(every), len(rest)] == [10, 6] and rest[0] == every[4]
    ddim = fast_of(DDIMScheduler)(clip_sample=False)
    ddim.set_timesteps(10)
    assert ddim.step_weights(ddim.timesteps[4:])[0] == ddim.step_weights()[4]


@pytest.mark.parametrize(
    ("stock_class", "options", "named"),
    [
        (DDIMScheduler, {}, "clip_sample"),
        (LCMScheduler, {"thresholding": True}, "thresholding"),
        (DPMSolverMultistepScheduler, {"thresholding": True}, "thresholding"),
    ],
)
def test_clipping_has_no_weights(stock_class, options, named):
    fast = fast_of(stock_class)(**options)
    fast.set_timesteps(10)
    with pytest.raises(ValueError, match=f"`{named}=True` makes the step nonlinear"):
        fast.step_weights()
