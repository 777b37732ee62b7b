"""The tiny SDXL: grammar, drawings, oracle, training and what the shipped checkpoint draws."""

import argparse
import builtins
import importlib.metadata
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff import EMBEDDED_CHECKPOINT
from fastdiff.shapes import captions
from fastdiff.shapes.captions import Scene, Thing
from fastdiff.shapes.training import architecture, evaluate, oracle, render, stages, train

RED_CIRCLE = Scene((Thing("circle", "red", "large", "left"),), "blue")


@pytest.fixture(scope="module")
def stock():
    pipeline = StableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Grammar


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), held_out=st.booleans(), loose=st.booleans())
def test_every_caption_parses_back_to_its_scene(seed, held_out, loose):
    rng = random.Random(seed)
    scene = captions.sample_scene(rng, held_out=held_out)
    assert captions.parse(captions.caption(scene, rng if loose else None)) == scene


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), held_out=st.booleans())
def test_the_splits_do_not_mix(seed, held_out):
    scene = captions.sample_scene(random.Random(seed), held_out=held_out)
    assert captions.is_held_out(scene) == held_out
    combinations = [(thing.shape, thing.colour, scene.background) for thing in scene.things]
    assert any(c in captions.held_out_combinations() for c in combinations) == held_out


def test_every_word_of_a_held_out_combination_is_trained_on_elsewhere():
    trained = [c for c in captions.combinations() if c not in captions.held_out_combinations()]
    for index, words in enumerate((captions.SHAPES, captions.COLOURS, captions.BACKGROUNDS)):
        assert {c[index] for c in trained} == set(words)


@pytest.mark.parametrize(
    "text",
    ["A RED circle, on a grey background.", "the red disc on gray background", "red circle gray background"],
)
def test_loose_wordings_are_understood(text):
    assert captions.parse(text) == Scene((Thing("circle", "red"),), "gray")
    assert captions.vocabulary_hint(text) is None


@pytest.mark.parametrize("text", ["", "an astronaut in a jungle", "a red circle", "a red circle on a red sofa", "红"])
def test_other_prompts_get_one_line_that_names_the_vocabulary(text):
    hint = captions.vocabulary_hint(text)
    assert "\n" not in hint
    for word in (*captions.SHAPES, *captions.COLOURS, *captions.BACKGROUNDS, "--model"):
        assert word in hint
    example = hint.split('"')[1]
    assert captions.vocabulary_hint(example) is None


# Drawings and oracle


def test_drawings_are_reproducible_and_stay_inside_the_canvas():
    rng = random.Random(3)
    for _ in range(100):
        scene = captions.sample_scene(rng)
        state = rng.getstate()
        one = render.render(scene, rng)
        rng.setstate(state)
        assert np.array_equal(one, render.render(scene, rng))
        rng.setstate(state)
        for spot in render.place(scene, rng):
            assert min(spot.x, spot.y) - spot.radius >= 1 or scene.relation
            for u, v in render.outline(spot.thing.shape):
                assert 0 <= spot.x + spot.radius * u <= render.CANVAS
                assert 0 <= spot.y + spot.radius * v <= render.CANVAS


def test_the_oracle_is_right_on_drawings():
    rng = random.Random(11)
    scenes = [captions.sample_scene(rng, held_out=index % 3 == 0) for index in range(400)]
    verdicts = [oracle.judge(scene, render.render(scene, rng)) for scene in scenes]
    for name in ("shape", "colour", "background", "position", "size"):
        assert sum(getattr(verdict, name) for verdict in verdicts) >= 0.99 * len(scenes), name


@pytest.mark.parametrize("size", [64, 192])
def test_the_oracle_is_right_at_other_sizes(size):
    rng = random.Random(13)
    scenes = [captions.sample_scene(rng) for _ in range(60)]
    pictures = [render.render(scene, rng).resize((size, size), Image.Resampling.LANCZOS) for scene in scenes]
    right = sum(oracle.judge(s, p).satisfied for s, p in zip(scenes, pictures, strict=True))
    assert right >= 0.95 * len(scenes)


@pytest.mark.parametrize(
    ("scene", "attribute"),
    [
        (Scene((Thing("square", "red", "large", "left"),), "blue"), "shape"),
        (Scene((Thing("circle", "green", "large", "left"),), "blue"), "colour"),
        (Scene((Thing("circle", "red", "large", "left"),), "black"), "background"),
        (Scene((Thing("circle", "red", "large", "top"),), "blue"), "position"),
        (Scene((Thing("circle", "red", "small", "left"),), "blue"), "size"),
    ],
)
def test_the_oracle_finds_the_one_attribute_that_is_wrong(scene, attribute):
    verdict = oracle.judge(RED_CIRCLE, render.render(scene, random.Random(0)))
    wrong = [name for name in ("shape", "colour", "background", "position", "size") if not getattr(verdict, name)]
    assert wrong == [attribute]
    assert verdict.satisfied == (attribute in ("position", "size"))


def test_the_oracle_tells_which_thing_has_which_colour_and_lies_where():
    things = Thing("circle", "red"), Thing("square", "green")
    drawn = render.render(Scene(things, "white", "left"), random.Random(0))
    assert oracle.judge("a red circle to the left of a green square on a white background", drawn).position
    assert not oracle.judge("a red circle to the right of a green square on a white background", drawn).position
    assert not oracle.judge("a green circle to the left of a red square on a white background", drawn).satisfied


def test_the_oracle_counts_things():
    two = Scene((Thing("circle", "red"), Thing("square", "green")), "white", "left")
    assert not oracle.judge("a red circle on a white background", render.render(two, random.Random(0))).shape
    empty = Image.new("RGB", (128, 128), render.PALETTE["white"])
    verdict = oracle.judge("a red circle on a white background", empty)
    assert verdict.background and not (verdict.shape or verdict.colour or verdict.position)


def test_the_oracle_names_noise_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not oracle.judge(RED_CIRCLE, noise).satisfied


def test_the_oracle_refuses_captions_outside_the_grammar():
    with pytest.raises(ValueError, match="an astronaut.*outside the grammar"):
        oracle.judge("an astronaut", Image.new("RGB", (128, 128)))


def test_the_oracle_names_the_extra_where_scikit_image_is_missing(monkeypatch):
    real = builtins.__import__

    def without_skimage(name, *args, **kwargs):
        if name.split(".")[0] == "skimage":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_skimage)
    with pytest.raises(ImportError, match="extra `test`"):
        oracle.judge(RED_CIRCLE, Image.new("RGB", (128, 128)))


# Architecture and tokenizer


def test_grammar_words_are_single_tokens_and_any_text_tokenises(stock):
    for word in captions.vocabulary():
        assert len(stock.tokenizer.tokenize(word)) == 1, word
    for text in ("Zebra ünïcode 中文 😀 \x00", "!" * 300, ""):
        for tokenizer in (stock.tokenizer, stock.tokenizer_2):
            ids = tokenizer(text, padding="max_length", truncation=True).input_ids
            assert len(ids) == 77 and max(ids) < stock.text_encoder.config.vocab_size
    assert stock.tokenizer_2("", padding="max_length").input_ids[-1] == 0


def test_the_shipped_checkpoint_has_the_architecture_of_the_code(stock):
    built = architecture.build_pipeline()
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours = {key: value.shape for key, value in getattr(built, name).state_dict().items()}
        assert ours == {key: value.shape for key, value in getattr(stock, name).state_dict().items()}, name
    assert built.tokenizer.get_vocab() == stock.tokenizer.get_vocab()
    assert built.tokenizer.tokenize("a red circles") == stock.tokenizer.tokenize("a red circles")


def test_building_is_deterministic():
    one, other = (architecture.build_pipeline(seed=4) for _ in range(2))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for a, b in zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_checkpoint_is_small(tmp_path):
    files = [file for file in Path(EMBEDDED_CHECKPOINT).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_what_float32_draws(stock, dtype):
    half = StableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    prompt = "a red circle on a white background"
    one, other = (
        np.asarray(p(prompt, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0], dtype=float)
        for p in (stock, half)
    )
    assert np.abs(one - other).mean() < 8


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 104), (192, 136)])
def test_other_sizes_run(stock, height, width):
    image = stock("a red circle on a white background", height=height, width=width, num_inference_steps=1).images[0]
    assert image.size == (width, height)


# Training


def _arguments(work_dir, **changes):
    defaults = dict.fromkeys(("vae_steps", "text_steps", "steps"), 2)
    defaults |= {"pool": 8, "seed": 0, "minutes": None, "device": "cpu"}
    return argparse.Namespace(work_dir=work_dir, output=work_dir / "out", **{**defaults, **changes})


def test_an_interrupted_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    for stage in (stages.AutoencoderStage, stages.TextStage, stages.DenoiserStage):
        monkeypatch.setattr(stage, "batch", 2)
    assert train.train(_arguments(tmp_path / "whole"))
    # No time left: the run stops before its first step, and saves where it is.
    assert not train.train(_arguments(tmp_path / "parts", minutes=1e-9))
    clock = iter([0.0, *[0.0] * 3, *[100.0] * 99])
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "monotonic", lambda: next(clock))
        assert not train.train(_arguments(tmp_path / "parts", minutes=1))
    assert train.train(_arguments(tmp_path / "parts"))
    for file in (tmp_path / "whole" / "out").rglob("*.safetensors"):
        other = tmp_path / "parts" / "out" / file.relative_to(tmp_path / "whole" / "out")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_training_lowers_the_loss_of_the_text_stage():
    torch.manual_seed(0)
    stage = stages.TextStage(architecture.build_pipeline(), 40, 0, torch.device("cpu"))
    stage.batch = 16
    optimizer = torch.optim.AdamW([p for m in stage.modules() for p in m.parameters()], lr=2e-3)
    losses = []
    for step in range(40):
        loss = stage.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_pool_is_scaled_to_unit_size():
    pool = stages.build_pool(architecture.build_pipeline().vae, 16, 0, torch.device("cpu"))
    assert pool.latents.shape == (16, 4, 16, 16) and len(pool.scenes) == 16
    assert pool.latents.float().square().mean().item() == pytest.approx(1, abs=1e-2)
    assert not any(captions.is_held_out(scene) for scene in pool.scenes)


# Evaluation


def test_evaluated_captions_are_distinct_and_held_out():
    scenes = evaluate.held_out_scenes(200)
    assert len(set(scenes)) == 200 and all(captions.is_held_out(scene) for scene in scenes)
    assert evaluate.held_out_scenes(10) == scenes[:10]


def test_variants_are_parsed():
    assert evaluate.parse_variant("stock") == ("stock", {})
    assert evaluate.parse_variant("stock:dtype=bfloat16") == ("stock", {"dtype": torch.bfloat16})
    name, fields = evaluate.parse_variant("balanced:guidance_interval=(0.1, 0.8),compile=off,fuse_qkv=False")
    assert name == "balanced"
    assert fields == {"guidance_interval": (0.1, 0.8), "compile": "off", "fuse_qkv": False}
    with pytest.raises(ValueError, match="field=value"):
        evaluate.parse_variant("exact:compile")
    with pytest.raises(ValueError, match="stock takes no field but dtype"):
        evaluate.load_variant("stock:compile=off", EMBEDDED_CHECKPOINT, "cpu")


def test_results_are_written_and_added_to(tmp_path, monkeypatch, capsys):
    command = ["evaluate", "--count", "2", "--steps", "1", "--batch", "2", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", [*command, "--variants", "stock", "--grid", str(tmp_path / "g.png")])
    evaluate.main()
    strip = ["--variants", "off", "stock", "--strip", str(tmp_path / "s.png")]
    monkeypatch.setattr("sys.argv", [*command, *strip])
    evaluate.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["stock", "off"]
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["rows"][1]["identical_pictures"] == 1.0
    assert result["rows"][1]["psnr_vs_stock_db"] is None and result["rows"][1]["ssim_vs_stock"] == 1.0
    assert Image.open(tmp_path / "g.png").width == 8 * 136
    assert Image.open(tmp_path / "s.png").height == 2 * 132


def test_the_shipped_checkpoint_draws_held_out_captions(stock):
    scenes = evaluate.held_out_scenes(8)
    pictures = evaluate.draw(stock, [captions.caption(scene) for scene in scenes], 8, 10, evaluate.GUIDANCE_SCALE)
    verdicts = [oracle.judge(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    assert sum(verdict.satisfied for verdict in verdicts) >= 6
