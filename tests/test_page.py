"""What the page does and shows, without gradio's client."""

import argparse

import numpy as np
import pytest
import torch
from conftest import noise_image, pixels
from PIL import Image

from app import Stopped, add_source, describe_model, film, read_settings
from metaquery import InputError
from notebooks.inside import light_up, look_inside, patch_maps
from sample import TINY, add_generation_options, generate


@pytest.fixture
def flags():
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    guidance = ["--guidance", "3", "--image-guidance", "1.5"]
    return parser.parse_args(["--steps", "4", "--num-images", "2", *guidance])


@pytest.mark.parametrize("diffusion", ("sana", "sd-v"))
def test_a_film_ends_in_what_is_generated_without_it(build, flags, diffusion):
    model = build("llava", diffusion)
    *guesses, (last, done) = film(model, "a red star", [], flags)
    assert len(guesses) == 4 and done and not any(flag for _, flag in guesses)
    alone = generate(model, [("a red star", [])], flags)[0]
    assert [pixels(image).tolist() for image in last] == [pixels(image).tolist() for image in alone]
    # The solver's last guess is the image, to a rounding error.
    assert (pixels(guesses[-1][0][0]).int() - pixels(alone[0]).int()).abs().max() <= 1


def test_an_error_ends_the_film(build, flags):
    model = build("qwen")
    with pytest.raises(InputError, match="reads text only"):
        list(film(model, "a red star", [noise_image(16, 16)], flags))
    assert list(film(model, "a red star", [], flags))  # and the next one is generated


def test_a_film_that_nobody_watches_stops(build, flags, monkeypatch):
    model, steps = build("qwen"), []
    monkeypatch.setattr(flags, "steps", 1000)
    plain = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *rest: steps.append(1) or plain(*rest))
    frames = film(model, "a red star", [], flags)
    next(frames)
    frames.close()
    monkeypatch.setattr(flags, "steps", 1)
    list(film(model, "a red star", [], flags))  # the one thread is free again
    assert len(steps) < 1000 and issubclass(Stopped, Exception)


@pytest.mark.parametrize(
    "name, value",
    [("steps", 2.5), ("steps", None), ("steps", 0), ("seed", 0.5), ("seed", -1), ("seed", "x"),
     ("num_images", 25), ("guidance", float("nan")), ("image_guidance", None)],
)  # fmt: skip
def test_a_number_that_is_wrong_is_one_line(flags, name, value):
    values = {"steps": 3, "seed": 7, "num_images": 2, "guidance": 2, "image_guidance": 1.5}
    assert read_settings(flags, **values).seed == 7
    with pytest.raises(ValueError, match=f"^{name} is {value}: give a"):
        read_settings(flags, **(values | {name: value}))


def test_the_title_says_what_the_model_can_generate(build):
    line, details = describe_model(None, TINY)
    assert line.startswith("It knows: circles, squares") and "up to four" in line
    assert details.count("\n- ") >= 3 and "##" not in details
    assert describe_model(build(), "some/checkpoint") == ("checkpoint: images of 8 × 8 pixels.", "")


@pytest.mark.parametrize("mllm, number", [("llava", 1), ("llava", 2), ("qwen-vl", 2)])
def test_patches_are_those_of_their_image(build, mllm, number):
    model = build(mllm)
    images = [noise_image(16, 16)] * number
    inputs = model.format(["a red star"], [images])
    places = torch.arange(inputs["input_ids"].shape[1]).view(1, 1, 1, -1)  # stand for weights
    found = [patches.flatten() for patches in patch_maps(model, images, inputs, places)]
    assert len(found) == number
    is_patch = inputs["input_ids"][0] == model.mllm.config.image_token_id
    assert is_patch[torch.cat(found)].all()
    per_image = is_patch.sum() // number  # images of one size take as many tokens each
    starts = is_patch.nonzero().flatten()[::per_image]
    assert [patches[0].item() for patches in found] == starts[:number].tolist()


@pytest.mark.parametrize("mllm", ("llava", "qwen", "qwen-vl"))
def test_inside_of_any_mllm(build, mllm):
    model = build(mllm)
    images = [] if mllm == "qwen" else [noise_image(32, 16)] * 2
    page = look_inside(model, "a <b>red</b> <|im_end|> star", images)
    assert page.count("<tr") == 1 + 5 and page.count("<img") == 5 * len(images)
    assert "<b>" not in page and "&gt;" in page  # the prompt is text, not HTML
    assert look_inside(model, "", images).count("<tr") == 0


def test_inside_of_a_model_without_queries_is_one_line(build):
    with pytest.raises(InputError, match="no queries"):
        look_inside(build("qwen", condition_on="last_layer"), "a red star")


def test_light_falls_where_the_weight_is(monkeypatch):
    shown = []
    plain = Image.composite
    monkeypatch.setattr(Image, "composite", lambda *a: shown.append(plain(*a)) or shown[-1])
    light_up(Image.new("RGB", (8, 8), "white"), torch.tensor([[0.0, 0.2], [0.0, 0.0]]))
    values = np.asarray(shown[0])
    assert (values[:80, 80:] == 255).all() and (values[80:] < 100).all()


def test_a_click_replaces_the_source_or_adds_a_subject():
    assert add_source("edit", ["a"], "b") == ["b"]
    assert add_source("subjects", ["a"], "b") == ["a", "b"]
    assert add_source("subjects", None, "b") == ["b"]
