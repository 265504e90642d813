"""Image files: every mode is read as it looks, a bad file is an error of one line."""

import io
import struct
import zlib

import commands
import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

from metaquery import InputError
from sample import grid, open_image, save_image
from toy.scene import render
from toy.tasks import task

call, check_refused = commands.call, commands.check_refused


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
def test_every_mode_is_seen_as_it_looks(tmp_path, mode):
    path, right = saved(tmp_path, mode)
    seen = open_image(path)
    assert seen.mode == "RGB" and seen.size == right.size
    assert np.abs(np.asarray(seen, int) - np.asarray(right, int)).max() <= 3


def test_damaged_exif_is_one_line(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    data = file.getvalue()
    chunk = b"eXIf" + b"garbage"
    chunk = struct.pack(">I", 7) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "x.png").write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(InputError, match="^cannot read .*x.png"):
        open_image(tmp_path / "x.png")


def test_edits_subjects_and_answers_on_the_command_line(call, tmp_path):
    render(task("edit", 0).sources[0]).save(tmp_path / "a.png")
    Image.new("L", (90, 50), 128).save(tmp_path / "b.png")
    out = tmp_path / "out.png"
    for flags in (
        ["make it green", "--image", "a.png"],
        ["both objects", "--image", "a.png", "--image", "b.png"],
        ["--image", "a.png", "--num-images", 4, "--image-guidance", 1],
    ):
        assert call("sample", *flags, "--steps", 2, "--out", out)[0] == 0
        assert out.exists()
        out.unlink()
    code, text, _ = call("sample", "how many objects?", "--image", "a.png", "--ask")
    assert code == 0 and text.strip()


def test_one_bad_image_of_many_loses_nothing(call, tmp_path):
    """The rest are generated, the bad ones named, and the exit code is 2."""
    (tmp_path / "list").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "list" / "a.png")
    noise_image(64, 64).save(tmp_path / "list" / "broken.png")
    data = (tmp_path / "list" / "broken.png").read_bytes()
    (tmp_path / "list" / "broken.png").write_bytes(data[:3000])
    rows = ['{"prompt": "make it blue", "images": ["a.png"]}'] * 10  # beside the list
    rows[4] = '{"prompt": "make it blue", "images": ["' + "x" * 5000 + '.png"]}'
    rows[6] = '{"prompt": "make it blue", "images": ["broken.png"]}'
    rows[8] = '{"prompt": '
    rows[9] = "[" * 200_000
    (tmp_path / "list" / "p.jsonl").write_text("\n".join(rows))
    done = call("sample", "--prompts", "list/p.jsonl", "--steps", 1, "--out", "out")
    check_refused(done, "broken.png")
    for words in ("prompt 5:", "prompt 7:", "line 9", "line 10"):
        assert words in done[2][0]
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == [f"{i:05d}.png" for i in (0, 1, 2, 3, 5, 7)]


def bomb(path):
    """A PNG of a few bytes that says it is 60,000 pixels a side."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize(
    "problem, words",
    [
        ("missing", "No such file"),
        ("truncated", "truncated"),
        ("text", "cannot identify"),
        ("bomb", "pixels"),
        ("many", "at most 6"),
        ("folder", "f.png"),
        ("loop", "f.png"),
    ],
)
def test_bad_images_are_one_line(call, tmp_path, problem, words):
    path = tmp_path / "f.png"
    if problem == "truncated":
        noise_image(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif problem == "text":
        path.write_text("no image at all")
    elif problem == "bomb":
        bomb(path)
    elif problem == "many":
        noise_image(9, 9).save(path)
    elif problem == "folder":
        path.mkdir()
    elif problem == "loop":
        path.symlink_to(path)
    flags = ["--image", path] * (7 if problem == "many" else 1)
    check_refused(call("sample", "make it green", *flags, "--out", "x.png"), words)
    assert not (tmp_path / "x.png").exists()


def test_a_link_is_followed_and_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "x.png"
    link.symlink_to(tmp_path / "disk" / "y.png")
    save_image(Image.new("RGB", (8, 8), "red"), link, prompt="é")
    assert link.is_symlink() and Image.open(tmp_path / "disk" / "y.png").text == {"prompt": "é"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["y.png"]


def test_a_grid_is_as_square_as_possible():
    images = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    sheet = grid(images)
    assert sheet.size == (8 + 2 + 8, 6 + 2 + 6)
    assert sheet.getpixel((0, 8)) == (0, 0, 255) and sheet.getpixel((17, 13)) == (190, 190, 190)
    assert grid(images, 3, gap=0).size == (24, 6)
