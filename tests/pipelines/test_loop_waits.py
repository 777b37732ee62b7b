"""The denoising loop, stock and fast, under the recorder; and many calls of one pipeline at once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from support.embedded import draw, load_fast, load_stock
from support.scheduler_runs import EIGHT
from support.sync_recorder import SyncRecorder
from support.tape_recorder import TapeRecorder

import fastdiff
from fastdiff import FastConfig, fast_scheduler
from fastdiff.graphs import GraphPool, apply_graphs, remove_graphs
from fastdiff.models.context import ContextKV

STEPS = 4
SDXL = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    **{"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False},
}

# What stock diffusers 0.42.1 waits for in the loop of 4 steps: "file:line" and how often.
KNOWN_IN_LOOP = {
    diffusers.EulerDiscreteScheduler: {},
    diffusers.EulerAncestralDiscreteScheduler: {},
    diffusers.HeunDiscreteScheduler: {},
    diffusers.DPMSolverMultistepScheduler: {},
    diffusers.DDIMScheduler: {
        "scheduling_ddim.py:281": 4,
        "scheduling_ddim.py:282": 7,
        "scheduling_ddim.py:448": 4,
        "scheduling_ddim.py:449": 7,
    },
    diffusers.LCMScheduler: {"scheduling_lcm.py:614": 4, "scheduling_lcm.py:615": 8},
    diffusers.TCDScheduler: {"scheduling_tcd.py:648": 4, "scheduling_tcd.py:651": 6, "scheduling_tcd.py:653": 3},
    diffusers.UniPCMultistepScheduler: {
        "scheduling_unipc_multistep.py:886": 8,
        "scheduling_unipc_multistep.py:900": 2,
        "scheduling_unipc_multistep.py:1021": 6,
        "scheduling_unipc_multistep.py:1035": 2,
        "scheduling_unipc_multistep.py:1078": 2,
    },
    diffusers.DDPMScheduler: {
        "scheduling_ddpm.py:381": 4,
        "scheduling_ddpm.py:382": 6,
        "scheduling_ddpm.py:503": 4,
        "scheduling_ddpm.py:504": 6,
        "scheduling_ddpm.py:543": 4,
        "scheduling_ddpm.py:661": 8,
        "scheduling_ddpm.py:662": 8,
        "scheduling_ddpm.py:665": 6,
    },
}
# And once per call, before the loop, with the default scheduler, a CPU generator and `denoising_end`.
KNOWN_BEFORE_LOOP = {
    "pipeline_stable_diffusion_xl.py:406": 2,  # token ids, one per text encoder
    "scheduling_euler_discrete.py:471": 1,  # sigmas to the device ...
    "scheduling_euler_discrete.py:477": 1,
    "scheduling_euler_discrete.py:481": 1,  # ... and back
    "torch_utils.py:110": 1,  # latents from a CPU generator
    "pipeline_stable_diffusion_xl.py:1157": 1,  # add_time_ids
    "pipeline_stable_diffusion_xl.py:1184": STEPS,  # denoising_end, one per timestep
}

of_stock_0_42_1 = pytest.mark.skipif(
    diffusers.__version__ != "0.42.1", reason="the lists name lines of diffusers 0.42.1"
)


def count(events) -> dict[str, int]:
    return dict(Counter(event.where.rpartition("/")[2] for event in events))


def run(pipe, **kwargs):
    """Run a pipeline with noise from the default generator, which is on the device, as far as torch knows."""
    torch.manual_seed(0)
    return draw(pipe, **{"num_inference_steps": STEPS, "output_type": "np", "generator": None, **kwargs})


def record(pipe, **kwargs):
    """The recorder after a call of a pipeline whose components are on the device, and what the call gave."""
    with SyncRecorder() as recorder, recorder.watch(pipe):
        image = run(pipe, **kwargs)
    return recorder, image


def with_scheduler(pipe, scheduler_class, **options):
    """Give a pipeline a scheduler with SDXL's betas and the prediction type of the checkpoint."""
    prediction_type = pipe.scheduler.config.prediction_type
    pipe.scheduler = scheduler_class.from_config({**SDXL, "prediction_type": prediction_type, **options})
    return pipe


def on_device(pipe):
    if hasattr(pipe, "plan"):
        pipe.explain()  # weights are fused where they are, before they move
    SyncRecorder.place(pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    return pipe


@pytest.fixture(scope="module")
def stock_on_device():
    return on_device(load_stock())


@pytest.fixture(scope="module")
def eager() -> FastConfig:
    return FastConfig.preset("exact", compile="off")


@pytest.fixture(scope="module")
def fast_on_device(eager):
    return on_device(load_fast(eager))


@pytest.fixture(scope="module")
def fast_img2img_on_device(eager):
    return on_device(fastdiff.FastStableDiffusionXLImg2ImgPipeline.from_pipe(load_stock(), fast=eager))


@of_stock_0_42_1
@pytest.mark.parametrize("scheduler", KNOWN_IN_LOOP, ids=lambda cls: cls.__name__)
def test_recorder_finds_the_known_waits_of_the_stock_loop(stock_on_device, scheduler):
    recorder, _ = record(with_scheduler(stock_on_device, scheduler))
    assert count(recorder.waits("loop")) == KNOWN_IN_LOOP[scheduler]
    assert count(recorder.waits("after")) == {"image_processor.py:204": 1}


@of_stock_0_42_1
def test_recorder_finds_the_known_waits_of_stock_outside_of_the_loop(stock_on_device):
    generator = torch.Generator().manual_seed(0)
    with_scheduler(stock_on_device, diffusers.EulerDiscreteScheduler)
    recorder, _ = record(stock_on_device, generator=generator, denoising_end=0.5)
    assert count(recorder.waits("before")) == KNOWN_BEFORE_LOOP


def check_no_wait_in_loop(recorder):
    assert recorder.waits("loop") == []
    assert recorder.copies("loop") == []
    assert [event.name for event in recorder.waits("after")] == ["device to host"]
    assert recorder.copies("after") == []


def check_fast_loop(stock, fast, scheduler, options):
    expected = run(with_scheduler(stock, scheduler), **options)
    with_scheduler(fast, scheduler)
    fast.scheduler = fast_scheduler(fast.scheduler)
    recorder, image = record(fast, **options)
    check_no_wait_in_loop(recorder)
    assert not any(event.where.startswith("diffusers/schedulers") for event in recorder.events)
    assert abs(image - expected).max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"denoising_end": 0.5}], ids=["text-to-image", "denoising_end"])
@pytest.mark.parametrize("scheduler", EIGHT, ids=lambda cls: cls.__name__)
def test_fast_loop_never_waits(stock, fast_on_device, scheduler, options):
    check_fast_loop(stock, fast_on_device, scheduler, options)


@pytest.mark.parametrize("scheduler", EIGHT, ids=lambda cls: cls.__name__)
def test_fast_image_to_image_loop_never_waits(stock, fast_img2img_on_device, scheduler):
    options = {"strength": 0.6, "image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    options |= {"width": None, "height": None}
    stock_img2img = StableDiffusionXLImg2ImgPipeline(**stock.components)
    stock_img2img.set_progress_bar_config(disable=True)
    check_fast_loop(stock_img2img, fast_img2img_on_device, scheduler, options)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (diffusers.EulerAncestralDiscreteScheduler, 0.0),
        (diffusers.LCMScheduler, 0.0),
        (diffusers.TCDScheduler, 0.5),
        (diffusers.DDIMScheduler, 0.5),
        (diffusers.DPMSolverMultistepScheduler, 0.0),
    ],
)
def test_noise_from_a_cpu_generator_is_copied_without_a_wait(stock, fast_on_device, scheduler, eta):
    options = {"algorithm_type": "sde-dpmsolver++"} if scheduler is diffusers.DPMSolverMultistepScheduler else {}
    expected = run(
        with_scheduler(stock, scheduler, **options), generator=torch.Generator().manual_seed(1), eta=eta
    )
    with_scheduler(fast_on_device, scheduler, **options)
    fast_on_device.scheduler = fast_scheduler(fast_on_device.scheduler)
    recorder, image = record(fast_on_device, generator=torch.Generator().manual_seed(1), eta=eta)
    assert recorder.waits("loop") == []
    assert 0 < len(recorder.copies("loop")) <= STEPS
    assert abs(image - expected).max() < 1e-4


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_leave_the_device_in_one_copy_and_one_wait(stock, fast_on_device, count):
    options = {"output_type": "pil", "num_images_per_prompt": count}
    expected = run(with_scheduler(stock, diffusers.EulerDiscreteScheduler), **options)
    with_scheduler(fast_on_device, diffusers.EulerDiscreteScheduler)
    fast_on_device.scheduler = fast_scheduler(fast_on_device.scheduler)
    recorder, pictures = record(fast_on_device, **options)
    assert [event.name for event in recorder.waits("after")] == ["synchronize"]
    # What was finite, twice, and the pictures themselves.
    assert [e.where.partition(":")[0] for e in recorder.events if e.phase == "after" and not e.wait] == [
        "fastdiff/models/finite.py",
        "fastdiff/models/finite.py",
        "fastdiff/pipelines/postprocess.py",
    ]
    assert len(pictures) == count
    for picture, stocks in zip(pictures, expected, strict=True):
        assert abs(np.asarray(picture, dtype=int) - np.asarray(stocks, dtype=int)).max() <= 1


def test_loop_with_graphs_never_waits(stock, fast_on_device):
    expected = run(with_scheduler(stock, diffusers.EulerDiscreteScheduler))
    with_scheduler(fast_on_device, diffusers.EulerDiscreteScheduler)
    fast_on_device.scheduler = fast_scheduler(fast_on_device.scheduler)
    record(fast_on_device)  # plans, which takes graphs off
    models, tape = [fast_on_device.unet, fast_on_device.vae], TapeRecorder("cuda:0")
    apply_graphs(models, GraphPool(tape), ContextKV)
    try:
        for _ in range(2):
            recorder, image = record(fast_on_device)
            check_no_wait_in_loop(recorder)
            assert abs(image - expected).max() < 1e-4
    finally:
        remove_graphs(models)
    assert tape.recorded == 2 and tape.replayed == 2 * STEPS


# Threads

CALLS = [(thread, call) for thread in range(8) for call in range(4)]


def one_call(pipe, thread: int, call: int) -> torch.Tensor:
    return draw(
        pipe,
        seed=4 * thread + call,
        prompt=["a red circle", "a blue square", "a green star"][(thread + call) % 3],
        num_inference_steps=2 + call,
        guidance_scale=[1.0, 4.0, 7.5][thread % 3],
    )


def check_threads_equal_sequence(pipes):
    expected = {key: one_call(pipes[0], *key) for key in CALLS}

    def four_calls(thread: int) -> dict:
        return {(thread, n): one_call(pipes[thread % len(pipes)], thread, n) for n in range(4)}

    with ThreadPoolExecutor(8) as pool:
        images = {key: image for result in pool.map(four_calls, range(8)) for key, image in result.items()}
    wrong = [key for key in CALLS if not torch.equal(images[key], expected[key])]
    assert wrong == []


@pytest.mark.parametrize("scheduler", [diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_eight_threads_on_one_pipeline_give_the_images_of_a_sequence(eager, scheduler):
    pipe = load_fast(eager)
    pipe.scheduler = fast_scheduler(scheduler.from_config(pipe.scheduler.config))
    check_threads_equal_sequence([pipe])


def test_threads_on_two_pipelines_with_one_scheduler_do_not_mix(eager):
    pipe = load_fast(eager)
    pipe.scheduler = fast_scheduler(diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config))
    other = type(pipe).from_pipe(pipe, fast=eager)
    other.set_progress_bar_config(disable=True)
    check_threads_equal_sequence([pipe, other])
