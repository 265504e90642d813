"""The page, through gradio's client, as a browser uses it; the shipped model generates."""

import argparse
import socket
import sys

import numpy as np
import pytest
from conftest import pixels
from PIL import Image

gradio = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

import app  # noqa: E402
from app import EXAMPLES, PAIR  # noqa: E402
from sample import add_generation_options, generate, load_model  # noqa: E402
from toy.scene import SHAPES, read, render  # noqa: E402
from toy.words import describe  # noqa: E402


@pytest.fixture(scope="module")
def flags():
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    return parser.parse_args([])


@pytest.fixture(scope="module")
def model(flags):
    model = load_model(flags, exact=True)
    model.generation_config["restates"] = True
    return model


@pytest.fixture(scope="module")
def client(model, flags):
    page = app.make_page(model, flags)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


@pytest.fixture
def request_of(tmp_path):
    """request_of(mode, prompt, images, steps, seed): what the page sends."""

    def make(mode, prompt="", images=(), steps=12, seed=0, num_images=1):
        files = []
        for number, image in enumerate(images):
            path = tmp_path / f"{number}.png"
            image.save(path)
            files.append({"image": handle_file(str(path)), "caption": None})
        return mode, prompt, files, "", 3, 3.25, steps, seed, num_images, []

    return make


EXPECTED = {  # what each example's image shows, or what is answered
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
    image, text, generated = client.predict(*request, api_name="/run")
    if mode == "ask":
        assert text["value"] == EXPECTED[prompt]
        return
    scene, clear = read(Image.open(image["value"]))
    assert clear and describe(scene) == EXPECTED[prompt]
    assert len(generated) == 1  # which one click makes the next source


def test_only_two_endpoints_are_public(client):
    api = client.view_api(return_format="dict")["named_endpoints"]
    assert set(api) == {"/run", "/inside"}
    labels = [value["label"] for value in api["/run"]["returns"]]
    assert labels[:2] == ["Image", "Drawn as"]


def test_the_image_is_shown_as_it_forms(client, request_of):
    job = client.submit(*request_of("generate", "a red star", steps=20), api_name="/run")
    final = Image.open(job.result()[0]["value"])
    outputs = job.outputs()
    assert any(isinstance(out[1], dict) and out[1].get("value") == "a red star" for out in outputs)
    frames = [out[0]["value"] for out in outputs if out[0] and out[0].get("value")]
    guesses = [np.asarray(Image.open(frame), int) for frame in frames[:-1]]
    assert len(guesses) >= 5
    off = [np.abs(guess - np.asarray(final, int)).mean() for guess in guesses]
    assert off[-1] < 1 < off[0]


def test_ten_requests_at_once_all_come_back_right(client, request_of, model, flags):
    flags = argparse.Namespace(**vars(flags) | {"steps": 4})
    prompts = [f"a {color} {shape}" for color in ("red", "blue") for shape in SHAPES[:5]]
    jobs = []
    for seed, prompt in enumerate(prompts):
        request = request_of("generate", prompt, steps=4, seed=seed)
        jobs.append(client.submit(*request, api_name="/run"))
    for seed, (prompt, job) in enumerate(zip(prompts, jobs, strict=True)):
        alone = generate(model, [(prompt, [])], flags, seeds=[seed])[0][0]
        image = Image.open(job.result(60)[0]["value"])
        assert (pixels(image).int() - pixels(alone).int()).abs().max() <= 1


def test_all_images_are_kept(client, request_of):
    request = request_of("generate", "a red star", steps=1, num_images=3)
    before = client.predict(*request, api_name="/run")[2]
    assert len(before) == 3
    before = [{"image": handle_file(one["image"]), "caption": None} for one in before]
    assert len(client.predict(*request[:-1], before, api_name="/run")[2]) == 6


def test_inside_shows_words_and_patches(client, request_of):
    request = request_of("edit", "make the star green", [render(PAIR)])[:3]
    page = client.predict(*request, api_name="/inside")
    assert page.count("<img") == 16
    assert all(f"{word}</th>" in page for word in ("star", "green"))


@pytest.mark.parametrize(
    "mode, prompt, words",
    [
        ("generate", " ", "the prompt is empty"),
        ("ask", "", "the prompt is empty"),
        ("edit", "make it red", "there is no source image"),
        ("reconstruct", "", "there is no source image"),
    ],
)
def test_what_is_missing_is_named(client, request_of, mode, prompt, words):
    with pytest.raises(AppError, match=words):
        client.predict(*request_of(mode, prompt), api_name="/run")


def test_a_bad_image_is_one_line_and_the_page_goes_on(client, request_of, tmp_path):
    (tmp_path / "bad.png").write_text("not an image")
    files = [{"image": handle_file(str(tmp_path / "bad.png")), "caption": None}]
    request = list(request_of("edit", "make it red", steps=1))
    request[2] = files
    with pytest.raises(AppError) as caught:
        client.predict(*request, api_name="/run")
    line = str(caught.value)
    assert line.startswith("cannot read bad.png") and "gradio" not in line and "\n" not in line
    assert client.predict(*request_of("generate", "a star", steps=1), api_name="/run")[0]


def test_too_many_images_are_refused_as_by_the_command_line(client, request_of):
    with pytest.raises(AppError, match="too many images in a prompt: give at most 6."):
        request = request_of("subjects", "all of these", [render(PAIR)] * 7, steps=1)
        client.predict(*request, api_name="/run")


@pytest.mark.parametrize("place, value, words", [(6, 2.5, "steps is 2.5"), (7, None, "seed is")])
def test_a_bad_number_is_one_line(client, request_of, capfd, place, value, words):
    request = list(request_of("generate", "a star"))
    request[place] = value
    with pytest.raises(AppError, match=words):
        client.predict(*request, api_name="/run")
    assert "Traceback" not in capfd.readouterr().err


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit) as stopped:
        app.parse_arguments()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install gradio.\n"


def refused(monkeypatch, capsys, *flags):
    """The line on stderr of a command that is refused."""
    monkeypatch.setattr(sys, "argv", ["app.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_port_in_use_is_one_line(monkeypatch, capsys, model, flags):
    monkeypatch.setattr(
        app,
        "load_model",
        lambda args, exact: vars(args).update(vars(flags), port=args.port) or model,
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(monkeypatch, capsys, "--port", str(port))
    assert line == f"error: no port {port} is free: choose another --port."


def test_mistakes_of_the_command_line(monkeypatch, capsys):
    assert "--steps" in refused(monkeypatch, capsys, "--steps", "0")
    assert "nowhere" in refused(monkeypatch, capsys, "--checkpoint", "nowhere")
    assert "at most 24" in refused(monkeypatch, capsys, "--num-images", "25")
