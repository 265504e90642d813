"""What the page shows, without gradio."""

import argparse

import numpy as np
import pytest
import torch
from conftest import noise_picture, pixels
from PIL import Image

from sample import add_drawing_options, draw
from metaquery import InputError
from notebooks.page import film, light_up, look_inside, more_sources, patch_maps


@pytest.fixture
def flags():
    parser = argparse.ArgumentParser()
    add_drawing_options(parser)
    return parser.parse_args(["--steps", "4", "--num-images", "2"])


@pytest.mark.parametrize("diffusion", ("sana", "sd-v"))
def test_a_film_ends_in_what_is_drawn_without_it(build, flags, diffusion):
    model = build("llava", diffusion)
    *guesses, (last, done) = film(model, "a red star", [], flags)
    assert len(guesses) == 4 and done and not any(flag for _, flag in guesses)
    alone = draw(model, [("a red star", [])], flags)[0]
    assert [pixels(p).tolist() for p in last] == [pixels(p).tolist() for p in alone]
    # The solver's last guess is the picture, to a rounding error.
    assert (pixels(guesses[-1][0][0]).int() - pixels(alone[0]).int()).abs().max() <= 1


def test_an_error_of_drawing_ends_the_film(build, flags):
    model = build("qwen")
    with pytest.raises(ValueError, match="reads text only"):
        list(film(model, "a red star", [noise_picture(16, 16)], flags))
    assert list(film(model, "a red star", [], flags))  # and the next one is drawn


@pytest.mark.parametrize("mllm, number", [("llava", 1), ("llava", 2), ("qwen-vl", 2)])
def test_patches_are_those_of_their_picture(build, mllm, number):
    model = build(mllm)
    images = [noise_picture(16, 16)] * number
    inputs = model.prepare_inputs(["a red star"], [images])
    places = torch.arange(inputs["input_ids"].shape[1]).view(1, 1, 1, -1)  # stand for weights
    found = [patches.flatten() for patches in patch_maps(model, images, inputs, places)]
    assert len(found) == number
    is_patch = inputs["input_ids"][0] == model.mllm.config.image_token_id
    assert is_patch[torch.cat(found)].all()
    per_picture = is_patch.sum() // number  # pictures of one size take as many tokens each
    starts = is_patch.nonzero().flatten()[::per_picture]
    assert [patches[0].item() for patches in found] == starts[:number].tolist()


@pytest.mark.parametrize("mllm", ("llava", "qwen", "qwen-vl"))
def test_inside_of_any_mllm(build, mllm):
    model = build(mllm)
    images = [] if mllm == "qwen" else [noise_picture(32, 16)] * 2
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
    assert more_sources("edit", ["a"], "b") == ["b"]
    assert more_sources("subjects", ["a"], "b") == ["a", "b"]
    assert more_sources("subjects", None, "b") == ["b"]
    assert more_sources("edit", ["a"], None) == ["a"]
