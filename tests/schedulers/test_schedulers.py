"""Each fast scheduler against its stock parent, over the grid of its options."""

from __future__ import annotations

import itertools
import random

import diffusers
import pytest
import torch
from support.scheduler_runs import EIGHT, denoise, eight, fast_of

import fastdiff

SPACINGS = ["linspace", "leading", "trailing"]
FLAG = [False, True]
SIGMA_KINDS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
TABLE = {
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
    "rescale_betas_zero_snr": FLAG,
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
}
CLIPPING = {"thresholding": FLAG, "clip_sample": FLAG, "sample_max_value": [1.0, 1.5]}
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
ETAS = [{}, {"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0}]

# Options of the schedule, options of the step, and arguments of the step. A schedule reaches the step only as
# its tables, so each grid is run in full, and beside them a sample of all combinations. A dict as a value is
# a set of options that go together.
GRIDS = {
    diffusers.EulerDiscreteScheduler: (
        TABLE
        | {
            "sigmas": SIGMA_KINDS,
            "final_sigmas_type": ["zero", "sigma_min"],
            "interpolation_type": ["linear", "log_linear"],
            "timestep_type": ["discrete", "continuous"],
            "range": [{}, {"sigma_min": 0.1, "sigma_max": 10.0}],
        },
        {"prediction_type": PREDICTIONS, "timestep_type": ["discrete", "continuous"]},
        [{}, {"s_churn": 4.0, "s_noise": 1.003}, {"s_churn": 9.0, "s_tmin": 0.5, "s_tmax": 5.0}],
    ),
    diffusers.EulerAncestralDiscreteScheduler: (TABLE, {"prediction_type": PREDICTIONS}, [{}]),
    diffusers.HeunDiscreteScheduler: (
        {
            "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2", "exp"],
            "timestep_spacing": SPACINGS,
            "steps_offset": [0, 1],
            "sigmas": SIGMA_KINDS,
        },
        {"prediction_type": PREDICTIONS, "clip_sample": FLAG, "clip_sample_range": [1.0, 0.5]},
        [{}],
    ),
    diffusers.DPMSolverMultistepScheduler: (
        TABLE
        | {
            "sigmas": [*SIGMA_KINDS, {"use_lu_lambdas": True}, {"use_flow_sigmas": True, "flow_shift": 3.0}],
            "final_sigmas_type": ["zero", "sigma_min"],
            "lambda_min_clipped": [-float("inf"), -5.1],
        },
        {
            "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
            "solver_type": ["midpoint", "heun"],
            "solver_order": [1, 2, 3],
            "prediction_type": [*PREDICTIONS, "flow_prediction"],
            "final_sigmas_type": ["zero", "sigma_min"],
            "lower_order_final": FLAG,
            "euler_at_final": FLAG,
            "output": [{}, {"thresholding": True}, {"variance_type": "learned"}],
        },
        [{}],
    ),
    diffusers.UniPCMultistepScheduler: (
        TABLE
        | {
            "sigmas": [*SIGMA_KINDS, {"use_flow_sigmas": True, "flow_shift": 3.0}],
            "final_sigmas_type": ["zero", "sigma_min"],
        },
        {
            "solver_type": ["bh2", "bh1"],
            "solver_order": [1, 2, 3],
            "prediction_type": PREDICTIONS,
            "final_sigmas_type": ["zero", "sigma_min"],
            "predict_x0": FLAG,
            "lower_order_final": FLAG,
            "disable_corrector": [[], [0, 2]],
            "thresholding": FLAG,
        },
        [{}],
    ),
    diffusers.DDIMScheduler: (
        TABLE | {"set_alpha_to_one": FLAG},
        CLIPPING | {"prediction_type": PREDICTIONS, "set_alpha_to_one": FLAG},
        [*ETAS, {"use_clipped_model_output": True, "eta": 0.5}],
    ),
    diffusers.LCMScheduler: (
        TABLE | {"set_alpha_to_one": FLAG, "original_inference_steps": [50, 40]},
        CLIPPING | {"prediction_type": PREDICTIONS, "timestep_scaling": [10.0, 3.0]},
        [{}],
    ),
    diffusers.TCDScheduler: (
        TABLE | {"set_alpha_to_one": FLAG, "original_inference_steps": [50, 40]},
        CLIPPING | {"prediction_type": PREDICTIONS},
        ETAS,
    ),
}


def combinations(grid: dict) -> list[dict]:
    made = []
    for values in itertools.product(*grid.values()):
        options = {}
        for name, value in zip(grid, values, strict=True):
            options |= value if isinstance(value, dict) else {name: value}
        made.append(options)
    return made


def outcome(scheduler_class, options, run, *args, **kwargs):
    try:
        return run(scheduler_class(**options), *args, **kwargs)
    except Exception as error:  # of whatever kind stock raises for options that do not go together
        return type(error)


def check_equal(fast, stock, context) -> None:
    if isinstance(stock, type):
        assert fast is stock, context
        return
    assert fast.shape == stock.shape and fast.dtype == stock.dtype, context
    finite = stock.isfinite()  # with some options stock divides by zero in the last step
    assert torch.equal(finite, fast.isfinite()), context
    if finite.any():
        assert (fast - stock)[finite].abs().max() <= 1e-5 * stock[finite].abs().max(), context


def schedule(scheduler) -> list[torch.Tensor]:
    scheduler.set_timesteps(20)
    return [
        getattr(scheduler, name)
        for name in ("timesteps", "sigmas", "alphas_cumprod")
        if hasattr(scheduler, name)
    ]


def test_every_fast_class_is_public_and_has_its_options_here():
    assert set(GRIDS) == set(EIGHT)
    assert {f"Fast{cls.__name__}" for cls in EIGHT} == {name for name in fastdiff.__all__ if name.endswith("Scheduler")}


@pytest.mark.filterwarnings("ignore")
@eight
def test_every_option_of_the_schedule_gives_the_stock_tables(stock_class):
    supported = 0
    for options in combinations(GRIDS[stock_class][0]):
        stock = outcome(stock_class, options, schedule)
        fast = outcome(fast_of(stock_class), options, schedule)
        if isinstance(stock, type):
            assert fast is stock, options
            continue
        supported += 1
        for ours, theirs in zip(fast, stock, strict=True):
            assert ours.device.type == "cpu" and ours.dtype == theirs.dtype, options
            assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), options
    assert supported > 10


@pytest.mark.filterwarnings("ignore")
@eight
def test_every_option_of_the_step_gives_the_stock_samples(stock_class):
    supported = 0
    _, grid, step_options = GRIDS[stock_class]
    for options in combinations(grid):
        for step_kwargs in step_options:
            stock = outcome(stock_class, options, denoise, **step_kwargs)
            fast = outcome(fast_of(stock_class), options, denoise, **step_kwargs)
            check_equal(fast, stock, (options, step_kwargs))
            supported += not isinstance(stock, type)
    assert supported > 1


@pytest.mark.filterwarnings("ignore")
@eight
def test_a_sample_of_all_combinations_gives_the_stock_samples(stock_class):
    table, step, step_options = GRIDS[stock_class]
    pick = random.Random(0)
    for _ in range(60):
        options = {}
        for name, values in {**table, **step}.items():
            value = pick.choice(values)
            options |= value if isinstance(value, dict) else {name: value}
        step_kwargs, steps = pick.choice(step_options), pick.choice([1, 2, 3, 14, 15, 25])
        stock = outcome(stock_class, options, denoise, steps, **step_kwargs)
        fast = outcome(fast_of(stock_class), options, denoise, steps, **step_kwargs)
        check_equal(fast, stock, (options, step_kwargs, steps))
