"""Each fast scheduler against its stock parent: ways to call it, to convert it, and to call it wrongly."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from support.embedded import load_stock
from support.scheduler_runs import EIGHT, SHAPE, denoise, eight, fast_of, linear_options, model, noise, takes
from support.sync_recorder import SyncRecorder

from fastdiff import fast_scheduler

WITH_VELOCITY = [cls for cls in EIGHT if hasattr(cls, "get_velocity")]
WITH_INDEX = [cls for cls in EIGHT if hasattr(cls, "set_begin_index")]
CUSTOM_TIMESTEPS = [cls for cls in EIGHT if takes(cls, "set_timesteps", "timesteps")]
by_name = {"ids": lambda cls: cls.__name__}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def pair(stock_class, steps: int | None = 10, **options):
    """A stock scheduler and its fast twin, with the same options and schedule."""
    made = stock_class(**options), fast_of(stock_class)(**options)
    for scheduler in made:
        if steps is not None:
            scheduler.set_timesteps(steps)
    return made


def one_step(scheduler, timestep, sample, **kwargs):
    if takes(scheduler, "step", "generator"):
        kwargs["generator"] = torch.Generator().manual_seed(3)
    scaled = scheduler.scale_model_input(sample, timestep)
    return scheduler.step(model(scaled), timestep, sample, **kwargs)


def check_same(fast: torch.Tensor, stock: torch.Tensor) -> None:
    assert fast.dtype == stock.dtype and torch.equal(fast, stock)


# Schedules


@eight
@pytest.mark.parametrize(
    "device", [None, "cpu", torch.device("cpu"), "cuda", torch.device("cuda", 0)], ids=str
)
def test_schedule_is_on_the_host_whatever_the_device(stock_class, device):
    stock, fast = pair(stock_class, None)
    stock.set_timesteps(10)
    fast.set_timesteps(10, device=device)
    assert fast.timesteps.device.type == "cpu" and torch.equal(fast.timesteps, stock.timesteps)
    assert all(value.device.type == "cpu" for value in vars(fast).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("stock_class", CUSTOM_TIMESTEPS, **by_name)
@pytest.mark.parametrize("as_type", [list, np.array])
def test_custom_timesteps(stock_class, as_type):
    stock, fast = pair(stock_class, None)
    for scheduler in (stock, fast):
        scheduler.set_timesteps(timesteps=as_type([999, 700, 400, 100]))
    assert (
        torch.equal(fast.timesteps, stock.timesteps) and fast.num_inference_steps == stock.num_inference_steps
    )
    x = noise(*SHAPE)
    stock_out, fast_out = (one_step(s, s.timesteps[0], x)[0] for s in (stock, fast))
    check_same(fast_out, stock_out)


@pytest.mark.parametrize(
    ("stock_class", "options", "sigmas"),
    [
        (EulerDiscreteScheduler, {}, [14.6, 6.0, 1.5, 0.5, 0.0]),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, np.array([14.6, 6.0, 6.0, 0.5, 0.0])),
        (UniPCMultistepScheduler, FLOW, np.array([0.9, 0.5, 0.2])),
    ],
)
def test_custom_sigmas(stock_class, options, sigmas):
    stock, fast = pair(stock_class, None, **options)
    for scheduler in (stock, fast):
        scheduler.set_timesteps(sigmas=sigmas)
    assert torch.equal(fast.timesteps, stock.timesteps) and torch.equal(fast.sigmas, stock.sigmas)


RARE = [
    (EIGHT, {"trained_betas": np.linspace(1e-4, 0.03, 600).tolist(), "num_train_timesteps": 600}, {}),
    (EIGHT, {"beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 500}, {}),
    ([DPMSolverMultistepScheduler], {"use_flow_sigmas": True, "use_dynamic_shifting": True}, {"mu": 0.7}),
    ([UniPCMultistepScheduler], {**FLOW, "use_dynamic_shifting": True}, {"mu": 0.7}),
    ([UniPCMultistepScheduler], {**FLOW, "shift_terminal": 0.1}, {}),
    ([UniPCMultistepScheduler], {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, {}),
    ([UniPCMultistepScheduler], {"solver_p": DDIMScheduler(clip_sample=False)}, {}),
    ([LCMScheduler, TCDScheduler], {}, {"original_inference_steps": 100, "strength": 0.7}),
    ([HeunDiscreteScheduler], {}, {"num_train_timesteps": 800}),
]


@pytest.mark.parametrize(
    ("stock_class", "options", "schedule"),
    [(cls, options, schedule) for classes, options, schedule in RARE for cls in classes],
)
def test_rare_options(stock_class, options, schedule):
    results = []
    for scheduler in pair(stock_class, None, **options):
        scheduler.set_timesteps(10, **schedule)
        sample = noise(*SHAPE)
        for timestep in scheduler.timesteps:
            sample = one_step(scheduler, timestep, sample, return_dict=False)[0]
        results.append(sample)
    check_same(*results)


@eight
def test_a_second_schedule_starts_afresh(stock_class):
    _, used = pair(stock_class, None)
    denoise(used, 7)
    _, new = pair(stock_class, None)
    assert torch.equal(denoise(used, 5), denoise(new, 5))


@eight
def test_signatures_that_diffusers_reads_are_the_stock_ones(stock_class):
    fast_class = fast_of(stock_class)
    for name in ("__init__", "set_timesteps", "step", "scale_model_input", "add_noise"):
        assert inspect.signature(getattr(fast_class, name)) == inspect.signature(getattr(stock_class, name))
    for name in ("get_velocity", "index_for_timestep", "set_begin_index", "previous_timestep"):
        assert hasattr(fast_class, name) == hasattr(stock_class, name)
    assert fast_class.order == stock_class.order


# Steps


@eight
@pytest.mark.parametrize("kind", ["tensor", "int", "float", "numpy", "string"])
def test_every_kind_of_timestep_does_what_it_does_in_stock(stock_class, kind):
    stock, fast = pair(stock_class)
    kinds = {
        "tensor": lambda t: t,
        "int": int,
        "float": float,
        "numpy": lambda t: t.numpy()[()],
        "string": str,
    }
    results = []
    for scheduler in (stock, fast):
        try:
            results.append(one_step(scheduler, kinds[kind](scheduler.timesteps[0]), noise(*SHAPE))[0])
        except Exception as error:
            results.append(error)
    stock_result, fast_result = results
    if isinstance(stock_result, Exception):
        # Where stock fails with something about attributes or indices, a clear error may take its place.
        assert isinstance(fast_result, (type(stock_result), ValueError))
    else:
        check_same(fast_result, stock_result)


@eight
def test_step_takes_keywords_and_gives_the_stock_output(stock_class):
    stock, fast = pair(stock_class)
    x = noise(*SHAPE)
    outputs = []
    for scheduler in (stock, fast):
        t = scheduler.timesteps[0]
        m = model(scheduler.scale_model_input(sample=x, timestep=t))
        torch.manual_seed(0)
        outputs.append(scheduler.step(model_output=m, timestep=t, sample=x, return_dict=True))
    assert type(outputs[0]) is type(outputs[1]) and outputs[0].keys() == outputs[1].keys()
    for name in outputs[0].keys():
        check_same(outputs[1][name], outputs[0][name])


@pytest.mark.parametrize("stock_class", WITH_INDEX, **by_name)
def test_begin_index_of_image_to_image(stock_class):
    results = []
    for scheduler in pair(stock_class):
        begin = 4 * scheduler.order
        scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        sample = scheduler.add_noise(noise(*SHAPE), noise(*SHAPE, seed=1), timesteps[:1].repeat(SHAPE[0]))
        for timestep in timesteps:
            sample = one_step(scheduler, timestep, sample, return_dict=False)[0]
            # As the inpainting pipeline does in each step.
            masked = scheduler.add_noise(noise(*SHAPE), noise(*SHAPE, seed=1), timestep[None])
            sample = (
                0.5 * sample + 0.5 * masked if scheduler.order == 1 and timestep != timesteps[-1] else sample
            )
        assert scheduler.begin_index == begin and scheduler.step_index == begin + len(timesteps)
        results.append(sample)
    check_same(results[1], results[0])


@pytest.mark.parametrize("stock_class", WITH_INDEX, **by_name)
def test_start_without_a_begin_index_is_found_on_the_host(stock_class):
    stock, fast = pair(stock_class)
    x = noise(*SHAPE)
    results = [
        one_step(scheduler, scheduler.timesteps[5], x, return_dict=False)[0] for scheduler in (stock, fast)
    ]
    assert fast.step_index == stock.step_index
    check_same(results[1], results[0])


@eight
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_dtypes_of_stock(stock_class, dtype):
    options = linear_options(stock_class)
    stock = denoise(stock_class(**options), 8, dtype)
    fast = denoise(fast_of(stock_class)(**options), 8, dtype)
    assert fast.dtype == stock.dtype == dtype
    assert torch.equal(fast, stock)


@eight
def test_timestep_on_the_device_works_and_waits(stock_class):
    stock, fast = pair(stock_class, **linear_options(stock_class))
    x = noise(*SHAPE)
    torch.manual_seed(0)
    t = stock.timesteps[0]
    expected = stock.step(model(stock.scale_model_input(x, t)), t, x, return_dict=False)[0]
    with SyncRecorder() as recorder:
        torch.manual_seed(0)
        t, on_device = recorder.on_device(fast.timesteps[0]), recorder.on_device(x)
        scaled = fast.scale_model_input(on_device, t)
        model_output = recorder.on_device(model(scaled.host))
        out = fast.step(model_output, t, on_device, return_dict=False)[0].host
    assert {event.name for event in recorder.events} == {"device to host"}
    check_same(out, expected)


# add_noise and get_velocity

SAMPLES = {
    "float32": lambda: (noise(3, 4, 5, 5), noise(3, 4, 5, 5, seed=1)),
    "bfloat16": lambda: (noise(3, 4, 5, 5).bfloat16(), noise(3, 4, 5, 5, seed=1).bfloat16()),
    "float64": lambda: (noise(3, 4, 5, 5).double(), noise(3, 4, 5, 5, seed=1).double()),
    "mixed": lambda: (noise(3, 4, 5, 5), noise(3, 4, 5, 5, seed=1).bfloat16()),
    "mixed otherwise": lambda: (noise(3, 4, 5, 5).bfloat16(), noise(3, 4, 5, 5, seed=1)),
    "one sample": lambda: (noise(1, 4, 5, 5), noise(1, 4, 5, 5, seed=1)),
    "video": lambda: (noise(3, 4, 2, 5, 5), noise(3, 4, 2, 5, 5, seed=1)),
    "vectors": lambda: (noise(3, 6), noise(3, 6, seed=1)),
}
POSITIONS = {"different": [1, 5, 8], "equal": [2, 2, 2], "single": [3]}


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("positions", POSITIONS)
@eight
def test_noise_and_velocity_are_bit_identical(stock_class, positions, samples):
    stock, fast = pair(stock_class)
    timesteps = stock.timesteps[POSITIONS[positions]]
    x, n = SAMPLES[samples]()
    stock_out, fast_out = stock.add_noise(x, n, timesteps), fast.add_noise(x, n, timesteps)
    assert fast_out.dtype == stock_out.dtype and torch.equal(fast_out, stock_out)
    keywords = fast.add_noise(original_samples=x, noise=n, timesteps=timesteps)
    assert torch.equal(keywords, stock_out)
    if stock_class in WITH_VELOCITY:
        stock_out, fast_out = stock.get_velocity(x, n, timesteps), fast.get_velocity(x, n, timesteps)
        assert fast_out.dtype == stock_out.dtype and torch.equal(fast_out, stock_out)


@eight
def test_noise_for_training_before_any_schedule(stock_class):
    stock, fast = pair(stock_class, None)
    timesteps = stock.timesteps[[900, 20, 500]]
    x, n = noise(3, 4, 5, 5), noise(3, 4, 5, 5, seed=1)
    assert torch.equal(fast.add_noise(x, n, timesteps), stock.add_noise(x, n, timesteps))


@eight
def test_noise_never_waits_and_copies_only_weights_that_differ(stock_class):
    fast = pair(stock_class)[1]
    with SyncRecorder() as recorder:
        x, n = recorder.on_device(noise(3, 4, 5, 5)), recorder.on_device(noise(3, 4, 5, 5, seed=1))
        out = fast.add_noise(x, n, fast.timesteps[[2, 2, 2]])
        assert recorder.events == [] and out.device.type == "cuda"
        fast.add_noise(x, n, fast.timesteps[[1, 5, 8]])
        assert [event.name for event in recorder.events] == ["host to device"]
    assert fast.alphas_cumprod.device.type == "cpu"


DEVICE_OPTIONS = [
    *[(cls, {"thresholding": True}) for cls in EIGHT if takes(cls, "__init__", "thresholding")],
    *[(cls, {"clip_sample": True}) for cls in EIGHT if takes(cls, "__init__", "clip_sample")],
    *[(cls, {"prediction_type": "v_prediction", **linear_options(cls)}) for cls in EIGHT],
    (DPMSolverMultistepScheduler, {"solver_order": 3}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (UniPCMultistepScheduler, {"solver_order": 3}),
    (UniPCMultistepScheduler, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("stock_class", "options"), DEVICE_OPTIONS)
def test_steps_on_the_device_never_wait_and_equal_the_host(stock_class, options):
    stock, fast = pair(stock_class, 6, **options)
    x = noise(*SHAPE)
    torch.manual_seed(0)
    for timestep in stock.timesteps:
        x = stock.step(model(stock.scale_model_input(x, timestep)), timestep, x, return_dict=False)[0]
    with SyncRecorder() as recorder:
        y = recorder.on_device(noise(*SHAPE))
        drift = recorder.on_device(noise(*SHAPE[1:], seed=7))
        torch.manual_seed(0)
        for timestep in fast.timesteps:
            model_output = torch.tanh(fast.scale_model_input(y, timestep) + drift)
            y = fast.step(model_output, timestep, y, return_dict=False)[0]
    assert recorder.events == []
    assert (y.host - x).abs().max() <= 1e-5 * x.abs().max()


# Conversions


@eight
def test_configurations_round_trip_both_ways(stock_class, tmp_path):
    options = {
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    stock, fast = pair(stock_class, None, **options)
    assert fast.to_json_string() == stock.to_json_string() and repr(fast) == repr(stock)
    assert fast.compatibles and set(fast.compatibles) == set(stock.compatibles)
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == stock_class.__name__
    loaded = stock_class.from_pretrained(tmp_path)
    assert type(loaded) is stock_class and loaded.to_json_string() == stock.to_json_string()
    stock.save_config(tmp_path / "stock")
    loaded = fast_of(stock_class).from_pretrained(tmp_path / "stock")
    assert type(loaded) is fast_of(stock_class) and loaded.config.prediction_type == "v_prediction"
    assert type(stock_class.from_config(fast.config)) is stock_class
    for other in (EulerDiscreteScheduler, DDIMScheduler):
        converted = [other.from_config(s.config).to_json_string() for s in (fast, stock)]
        assert converted[0] == converted[1]


@eight
def test_a_pipeline_with_a_fast_scheduler_saves_a_stock_checkpoint(stock, stock_class, tmp_path):
    pipe = StableDiffusionXLPipeline(**stock.components)
    pipe.scheduler = fast_of(stock_class).from_config(pipe.scheduler.config)
    assert pipe.config["scheduler"] == ("diffusers", stock_class.__name__)
    rebuilt = StableDiffusionXLPipeline(**pipe.components)
    assert rebuilt.config["scheduler"] == ("diffusers", stock_class.__name__)


def test_a_saved_pipeline_loads_in_stock(tmp_path):
    pipe = load_stock()
    pipe.scheduler = fast_scheduler(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    scheduler_class = type(StableDiffusionXLPipeline.from_pretrained(tmp_path).scheduler)
    assert scheduler_class.__module__.startswith(
        "diffusers."
    ) and not scheduler_class.__qualname__.startswith("Fast")


@eight
def test_fast_scheduler_takes_over_a_run_under_way(stock_class):
    stock = stock_class(**linear_options(stock_class))
    stock.set_timesteps(6)
    x = noise(*SHAPE)
    for timestep in stock.timesteps[:3]:
        x = one_step(stock, timestep, x, return_dict=False)[0]
    fast = fast_scheduler(stock)
    assert type(fast) is fast_of(stock_class) and fast.config == stock.config
    results = []
    for scheduler in (fast, stock):  # the fast one first: it must leave the other's state alone
        sample = x
        for timestep in stock.timesteps[3:]:
            sample = one_step(scheduler, timestep, sample, return_dict=False)[0]
        results.append(sample)
    check_same(*results)


def pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


@eight
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_owns_its_state(stock_class, duplicate):
    fast = fast_of(stock_class)(**linear_options(stock_class))
    fast.set_timesteps(6)
    x = noise(*SHAPE)
    for timestep in fast.timesteps[:2]:
        x = one_step(fast, timestep, x, return_dict=False)[0]
    twin = duplicate(fast)
    assert type(twin) is type(fast) and twin.config == fast.config
    y = x
    for timestep in fast.timesteps[2:4]:
        x, y = (one_step(s, timestep, v, return_dict=False)[0] for s, v in ((fast, x), (twin, y)))
        assert torch.equal(x, y)
    denoise(twin, 3)
    z = one_step(fast, fast.timesteps[4], x, return_dict=False)[0]
    assert z.isfinite().all() and len(fast.timesteps) == 6 * fast.order - (fast.order - 1)


def test_a_device_schedule_of_stock_comes_back_to_the_host():
    with SyncRecorder() as recorder:
        stock = DDIMScheduler()
        stock.set_timesteps(5, device="cuda")
        stock.add_noise(recorder.on_device(noise(2, 4)), recorder.on_device(noise(2, 4)), stock.timesteps[:2])
        assert stock.alphas_cumprod.device.type == "cuda"
        fast = fast_scheduler(stock)
    assert all(v.device.type == "cpu" for v in vars(fast).values() if isinstance(v, torch.Tensor))
    assert torch.equal(fast.timesteps, stock.timesteps.host)


def test_what_has_no_fast_twin_stays_as_it_is():
    class Mine(EulerDiscreteScheduler):
        pass

    for scheduler in (DDPMScheduler(), Mine(), fast_of(EulerDiscreteScheduler)()):
        assert fast_scheduler(scheduler) is scheduler
    with pytest.raises(TypeError, match="takes a EulerDiscreteScheduler, not a .*Mine"):
        fast_of(EulerDiscreteScheduler).from_stock(Mine())
    with pytest.raises(TypeError, match="from_config"):
        fast_of(EulerDiscreteScheduler).from_stock(DDIMScheduler())


def test_a_subclass_of_a_fast_class_keeps_its_own_name():
    class Mine(fast_of(EulerDiscreteScheduler)):
        pass

    assert Mine.__name__ == "Mine" and Mine().config["num_train_timesteps"] == 1000
    assert fast_scheduler(mine := Mine()) is mine and type(copy.deepcopy(mine)) is Mine


# Bad input


def outcome(run) -> torch.Tensor | str:
    """What a call returns, or that it raised, in whatever words."""
    try:
        return run()
    except (AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return "raised"


@eight
@pytest.mark.parametrize("timestep", [12345.5, -3.5, "999", -1, torch.tensor(1000), torch.tensor(2)], ids=str)
def test_a_timestep_is_refused_where_stock_refuses_it(stock_class, timestep):
    stock, fast = pair(stock_class)
    x = noise(*SHAPE)
    expected, actual = (outcome(lambda s=s: s.step(x, timestep, x, return_dict=False)[0]) for s in (stock, fast))
    if isinstance(expected, str):
        assert actual == expected
        with pytest.raises(ValueError, match="in the schedule.*scheduler.timesteps|scheduler.timesteps"):
            fast.step(x, timestep, x)
    else:
        assert torch.equal(actual, expected)


@eight
def test_a_step_on_the_training_schedule(stock_class):
    stock, fast = pair(stock_class, None)
    x = noise(*SHAPE)
    expected, actual = (outcome(lambda s=s: one_step(s, s.timesteps[0], x)[0]) for s in (stock, fast))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match="set_timesteps"):
            one_step(fast, fast.timesteps[0], x)
    else:
        assert torch.equal(actual, expected)


def test_heun_has_a_schedule_from_the_start_as_in_stock():
    stock, fast = pair(HeunDiscreteScheduler, None)
    assert fast.num_inference_steps == stock.num_inference_steps == 1000
    x = noise(*SHAPE)
    assert torch.equal(one_step(fast, fast.timesteps[0], x)[0], one_step(stock, stock.timesteps[0], x)[0])


@eight
@pytest.mark.parametrize("steps", [0, -1, -20])
def test_zero_or_negative_steps_are_refused_where_stock_refuses_them(stock_class, steps):
    stock, fast = stock_class(), fast_of(stock_class)()
    if outcome(lambda: stock.set_timesteps(steps)) == "raised":
        with pytest.raises(ValueError, match=f"`num_inference_steps` must be 1 or more, got {steps}"):
            fast.set_timesteps(steps)
    else:
        fast.set_timesteps(steps)
        assert torch.equal(fast.timesteps, stock.timesteps)


@eight
def test_no_steps_at_all(stock_class):
    with pytest.raises(ValueError, match="num_inference_steps"):
        fast_of(stock_class)().set_timesteps()


@pytest.mark.parametrize("stock_class", CUSTOM_TIMESTEPS, **by_name)
def test_empty_timesteps(stock_class):
    stock, fast = stock_class(), fast_of(stock_class)()
    if outcome(lambda: stock.set_timesteps(timesteps=[])) == "raised":
        with pytest.raises(ValueError, match="`timesteps` is empty"):
            fast.set_timesteps(timesteps=[])
    else:
        fast.set_timesteps(timesteps=[])


@eight
def test_both_timesteps_and_sigmas(stock_class):
    fast = fast_of(stock_class)()
    expected = ValueError if stock_class is EulerDiscreteScheduler else TypeError
    with pytest.raises(expected, match="sigmas|timesteps"):
        fast.set_timesteps(timesteps=[999, 500], sigmas=[10.0, 5.0, 0.0])


@pytest.mark.parametrize(("stock_class", "options"), [(EulerDiscreteScheduler, {}), (UniPCMultistepScheduler, FLOW)])
def test_unsorted_sigmas_as_in_stock_but_not_those_that_are_no_numbers(stock_class, options):
    stock, fast = stock_class(**options), fast_of(stock_class)(**options)
    for scheduler in (stock, fast):
        scheduler.set_timesteps(sigmas=np.array([14.0, 3.0, 3.5, 0.5]))
    assert torch.equal(fast.sigmas, stock.sigmas) and torch.equal(fast.timesteps, stock.timesteps)
    with pytest.raises(ValueError, match="`sigmas` must be finite"):
        fast.set_timesteps(sigmas=[14.0, float("nan"), 0.0])


@pytest.mark.parametrize("stock_class", [DDIMScheduler, LCMScheduler, TCDScheduler], **by_name)
def test_more_steps_than_trained_for(stock_class):
    with pytest.raises(ValueError, match="num_inference_steps"):
        fast_of(stock_class)().set_timesteps(2000)


@eight
def test_unknown_argument_of_set_timesteps(stock_class):
    with pytest.raises(TypeError, match="sigma_table"):
        fast_of(stock_class)().set_timesteps(10, sigma_table=[1.0])
