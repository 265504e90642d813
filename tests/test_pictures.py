"""Picture files: every mode is read as it looks, a bad file is an error of one line."""

import struct
import zlib

import numpy as np
import pytest
from conftest import check_refused, cli, noise_picture
from PIL import Image

from sample import grid, open_picture
from metaquery import to_rgb
from toy.scene import render
from toy.tasks import task


def saved(folder, mode):
    """A file with a red square on white, in some mode, and how it should look."""
    right = Image.new("RGB", (40, 30), "white")
    right.paste((220, 20, 20), (5, 5, 20, 20))
    path, options, picture = folder / f"{mode}.png", {}, right
    if mode == "palette":
        picture = right.quantize(4)
    elif mode == "grey":
        right = picture = right.convert("L")
    elif mode == "grey with alpha":
        right = right.convert("L")
        picture = right.convert("LA")
    elif mode == "16 bit":
        right = right.convert("L")
        picture = Image.fromarray(np.asarray(right).astype(np.uint16) * 257)
    elif mode == "transparent":
        picture = right.convert("RGBA")
        clear = np.asarray(picture).copy()
        clear[(clear[..., :3] == 255).all(-1)] = (9, 99, 9, 0)
        picture = Image.fromarray(clear)
    elif mode == "exif":
        path, picture = folder / "exif.png", right.rotate(90, expand=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        options["exif"] = exif
    elif mode == "black and white":
        right = picture = right.convert("1")
    elif mode == "CMYK":
        path, picture = folder / "cmyk.tiff", right.convert("CMYK")
    picture.save(path, **options)
    return path, right.convert("RGB")


MODES = (
    "rgb",
    "palette",
    "grey",
    "grey with alpha",
    "16 bit",
    "transparent",
    "exif",
    "black and white",
    "CMYK",
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_picture_is_seen_as_it_looks(tmp_path, mode):
    path, right = saved(tmp_path, mode)
    seen = to_rgb(open_picture(path))
    assert seen.mode == "RGB" and seen.size == right.size
    assert np.abs(np.asarray(seen, int) - np.asarray(right, int)).max() <= 3


def test_edits_subjects_and_answers_on_the_command_line(tmp_path):
    render(task("edit", 0).sources[0]).save(tmp_path / "a.png")
    Image.new("L", (90, 50), 128).save(tmp_path / "b.png")
    a, b, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "drawn.png"
    few = ("--steps", 2, "--out", out)
    for flags in (
        ["make it green", "--image", a],
        ["both objects", "--image", a, "--image", b],
        ["--image", a, "--num-images", 4, "--image-guidance", 1],
    ):
        done = cli(*flags, *few)
        assert done.returncode == 0, done.stderr
        assert out.exists()
        out.unlink()
    done = cli("how many objects?", "--image", a, "--ask")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_one_bad_picture_of_many_loses_nothing(tmp_path):
    """The rest are drawn, the bad ones named, and the exit code is 2."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    rows = ['{"prompt": "make it blue", "images": ["a.png"]}'] * 10
    rows[6] = '{"prompt": "make it blue", "images": ["broken.png"]}'
    rows[8] = '{"prompt": '
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    done = cli("--prompts", tmp_path / "p.jsonl", "--steps", 2, "--out", tmp_path / "drawn")
    check_refused(done, "broken.png")
    assert "prompt 7" in done.stderr and "line 9" in done.stderr
    names = [path.name for path in sorted((tmp_path / "drawn").iterdir())]
    assert names == [f"{i:05d}.png" for i in range(10) if i not in (6, 8)]


def bomb(path):
    """A PNG of a few bytes that says it is 60,000 pixels a side."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize(
    "what, words",
    [
        ("missing", "no picture"),
        ("truncated", "broken"),
        ("text", "not a picture"),
        ("bomb", "million pixels"),
        ("many", "at most 6"),
        ("folder", "f.png"),
    ],
)
def test_bad_pictures_are_one_line(tmp_path, what, words):
    path = tmp_path / "f.png"
    if what == "truncated":
        noise_picture(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif what == "text":
        path.write_text("no picture at all")
    elif what == "bomb":
        bomb(path)
    elif what == "many":
        noise_picture(9, 9).save(path)
    elif what == "folder":
        path.mkdir()
    flags = ["--image", path] * (7 if what == "many" else 1)
    done = cli("make it green", *flags, "--out", tmp_path / "x.png")
    check_refused(done, words)
    assert not (tmp_path / "x.png").exists()


def test_asking_without_a_question_is_one_line(tmp_path):
    check_refused(cli("--ask", "--image", "a.png"), "question")


def test_a_grid_is_as_square_as_possible():
    pictures = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    sheet = grid(pictures)
    assert sheet.size == (8 + 2 + 8, 6 + 2 + 6)
    assert sheet.getpixel((0, 8)) == (0, 0, 255) and sheet.getpixel((17, 13)) == (190, 190, 190)
    assert grid(pictures, 3, gap=0).size == (24, 6)
