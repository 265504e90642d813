"""The page, through gradio's client, as a browser uses it; the shipped weights draw."""

import argparse
import socket
import sys

import numpy as np
import pytest
from conftest import TINY, check_refused, pixels, run
from PIL import Image

gradio = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

import app  # noqa: E402
from sample import add_drawing_options, draw  # noqa: E402
from metaquery import MetaQuery  # noqa: E402
from notebooks.page import EXAMPLES, PAIR  # noqa: E402
from toy.scene import SHAPES, read, render  # noqa: E402
from toy.words import describe  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return MetaQuery.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def flags():
    parser = argparse.ArgumentParser()
    add_drawing_options(parser)
    return parser.parse_args([])


@pytest.fixture(scope="module")
def client(model, flags):
    page = app.make_page(model, flags)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


@pytest.fixture
def request_of(tmp_path):
    """request_of(mode, prompt, pictures, steps, seed): what the page sends."""

    def make(mode, prompt="", pictures=(), steps=30, seed=0):
        files = []
        for number, picture in enumerate(pictures):
            path = tmp_path / f"{number}.png"
            picture.save(path)
            files.append({"image": handle_file(str(path)), "caption": None})
        return mode, prompt, files, 3, 1.5, steps, seed, []

    return make


EXPECTED = {  # what each example's picture shows, or what is answered
    "a red star left of a blue circle": "a red star left of a blue circle",
    "three green crosses": "three green crosses",
    "a circle the colour of a ripe banana": "a yellow circle",
    "make the circle green": "a red star left of a green circle",
    "swap the star and the circle": "a blue circle left of a red star",
    "turn the star into a cross": "a red cross left of a blue circle",
    "": "a red star left of a blue circle",
    "two of this object": "two green crosses",
    "both objects side by side": "a green cross left of a pink diamond",
    "how many stars?": "one",
}


@pytest.mark.parametrize("mode, prompt, scenes", EXAMPLES, ids=lambda value: str(value)[:30])
def test_every_example_works(client, request_of, mode, prompt, scenes):
    request = request_of(mode, prompt, [render(scene) for scene in scenes])
    picture, answer, drawn = client.predict(*request, api_name="/run")
    if mode == "ask":
        assert answer["value"] == EXPECTED[prompt]
    else:
        scene, clear = read(Image.open(picture))
        assert clear and describe(scene) == EXPECTED[prompt]
        assert len(drawn) == 1  # which one click makes the next source


def test_the_drawing_is_shown_as_it_happens(client, request_of):
    job = client.submit(*request_of("draw", "a red star"), api_name="/run")
    final = Image.open(job.result()[0])
    guesses = [np.asarray(Image.open(out[0]), int) for out in job.outputs()[:-1]]
    assert len(guesses) == 10
    off = [np.abs(guess - np.asarray(final, int)).mean() for guess in guesses]
    assert off[-1] < 1 < off[0]


def test_ten_requests_at_once_all_come_back_right(client, request_of, model, flags):
    flags = argparse.Namespace(**vars(flags) | {"steps": 4})
    prompts = [f"a {color} {shape}" for color in ("red", "blue") for shape in SHAPES[:5]]
    jobs = []
    for seed, prompt in enumerate(prompts):
        jobs.append(client.submit(*request_of("draw", prompt, steps=4, seed=seed), api_name="/run"))
    for seed, (prompt, job) in enumerate(zip(prompts, jobs, strict=True)):
        alone = draw(model, [(prompt, [])], flags, seeds=[seed])[0][0]
        picture = Image.open(job.result(60)[0])
        assert (pixels(picture).int() - pixels(alone).int()).abs().max() <= 1


def test_what_was_drawn_is_kept(client, request_of):
    request = request_of("draw", "a red star", steps=1)
    before = client.predict(*request, api_name="/run")[2]
    before = [{"image": handle_file(one["image"]), "caption": None} for one in before]
    assert len(client.predict(*request[:-1], before, api_name="/run")[2]) == 2


def test_inside_shows_words_and_patches(client, request_of):
    request = request_of("edit", "make the star green", [render(PAIR)])[:3]
    page = client.predict(*request, api_name="/inside")
    assert page.count("<img") == 16
    assert all(f"{word}</th>" in page for word in ("star", "green"))


@pytest.mark.parametrize(
    "mode, prompt, words",
    [
        ("draw", " ", "the prompt is empty"),
        ("ask", "", "the prompt is empty"),
        ("edit", "make it red", "there is no source picture"),
        ("reconstruct", "", "there is no source picture"),
    ],
)
def test_what_is_missing_is_named(client, request_of, mode, prompt, words):
    with pytest.raises(AppError, match=words):
        client.predict(*request_of(mode, prompt), api_name="/run")


def test_a_bad_picture_is_one_line_and_the_page_still_draws(client, request_of, tmp_path):
    (tmp_path / "bad.png").write_text("not a picture")
    files = [{"image": handle_file(str(tmp_path / "bad.png")), "caption": None}]
    request = list(request_of("edit", "make it red", steps=1))
    request[2] = files
    with pytest.raises(AppError) as caught:
        client.predict(*request, api_name="/run")
    assert str(caught.value) == "bad.png is not a picture: name a PNG, JPEG or WebP file."
    assert client.predict(*request_of("draw", "a star", steps=1), api_name="/run")[0]


def test_too_many_pictures_are_refused_as_by_the_command_line(client, request_of):
    with pytest.raises(AppError, match="too many pictures for one prompt: give at most 6."):
        request = request_of("subjects", "all of these", [render(PAIR)] * 7, steps=1)
        client.predict(*request, api_name="/run")


def test_words_never_seen_are_named(client, request_of, monkeypatch):
    warned = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    client.predict(*request_of("draw", "a cat on a red sofa", steps=1), api_name="/run")
    assert warned == ["the tiny model never saw: cat, sofa."]


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit) as stopped:
        app.parse_arguments()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install gradio.\n"


def test_a_port_in_use_is_one_line(monkeypatch, capsys, model):
    monkeypatch.setattr(app.command_line, "load_model", lambda args: model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["app.py", "--port", str(port)])
        with pytest.raises(SystemExit) as stopped:
            app.main()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert line == f"error: no port {port} is free: choose another --port."


def test_mistakes_of_the_command_line():
    check_refused(run([sys.executable, "app.py", "--steps", "0"]), "--steps is 0")
    check_refused(run([sys.executable, "app.py", "--checkpoint", "nowhere"]), "nowhere")
