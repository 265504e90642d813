"""A table of real folders: the rows that each must give, on disk and streamed, and what is said."""

import base64
import csv
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import sources
from data.batches import Batch, open_batches
from metaquery import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0, 0, 0))


# ---- Files -----------------------------------------------------------------------------------


def image(number, kind="PNG"):
    """The bytes of an image whose red is its number, about."""
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (number * 10, 99, 200)).save(file, kind, quality=95)
    return file.getvalue()


BROKEN = b"broken"
CUT = image(1, "JPEG")[:-40]
png, chunk = image(9), b"eXIfgarbage"
EXIF = png[:33] + struct.pack(">I", 7) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))


def pairs(numbers, suffix="jpg", text="no {}"):
    """The members of a tar with these images and captions."""
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix, suffix.upper())
    for i in numbers:
        yield f"{i:04d}.{suffix}", image(i, kind)
        yield f"{i:04d}.txt", text.format(i)


def stored(data):
    return {"bytes": data, "path": None}


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns)
    for name, values in columns.items():
        if isinstance(values[0], dict):
            dataset = dataset.cast_column(name, datasets.Image())
        elif isinstance(values[0], list) and isinstance(values[0][0], dict):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image()))
    dataset.to_parquet(path)


def simple(path, numbers, text="no {}"):
    parquet(path, image=[stored(image(i)) for i in numbers],
            caption=[text.format(i) for i in numbers])  # fmt: skip


def folder(path, names, texts, metadata="metadata.jsonl"):
    """Images whose numbers are their places, and a table of captions."""
    for i, name in enumerate(names):
        write(path / name, image(i))
    rows = [{"file_name": n, "text": t} for n, t in zip(names, texts, strict=True)]
    if metadata.endswith("jsonl"):
        write(path / metadata, "\n".join(json.dumps(row) for row in rows))
    else:
        with open(path / metadata, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)


def table(path, rows):
    write(path, "\n".join(json.dumps(row) for row in rows))


def damage(path, start, length=500):
    data = bytearray(path.read_bytes())
    data[start : start + length] = os.urandom(length)
    path.write_bytes(data)


# ---- What a run sees -------------------------------------------------------------------------


class See:
    """A stand-in for Collate: what each row holds, as (prompt, number of target, sources)."""

    def __init__(self, stage, refuse=""):
        self.stage, self.refuse = stage, refuse

    def __call__(self, rows):
        if self.refuse and any(self.refuse in row.prompt for row in rows):
            raise ValueError("the processor refuses it")

        def number(image):
            return round(image.getpixel((5, 5))[0] / 10)

        return Batch([(r.prompt, number(r.target), len(r.images)) for r in rows], 0)


def see(data, count, stage="pretrain", *, collate=None, **options):
    """`count` rows, read in batches of one."""
    options = {"batch_size": 1, "steps": 10_000} | options
    batches = open_batches(str(data), stage, collate or See(stage), **options)
    return [row for _ in range(count) for row in next(batches).micro_batches]


def check(data, streaming, expected, stage="pretrain", **options):
    """An epoch holds exactly the expected rows, each once."""
    expected = Counter(expected)
    count = sum(expected.values())
    # One more row, so that the epoch's end is counted.
    seen = see(data, count + 1, stage, streaming=streaming, **options)
    assert Counter(seen[:count]) == expected


def numbered(numbers, text="no {}", sources=0):
    return [(text.format(i), i, sources) for i in numbers]


both = pytest.mark.parametrize("streaming", [False, True], ids=["disk", "streamed"])

# Each builds a folder; its rows; rows that are skipped; what is said of them.
CASES = {}


def case(rows, bad=0, said="", stage="pretrain"):
    def keep(build):
        name = build.__name__
        assert name not in CASES
        CASES[name] = SimpleNamespace(build=build, rows=rows, bad=bad, said=said, stage=stage)
        return build

    return keep


# Splits: train only


@case(numbered(range(3)))
def copy_of_a_hub_dataset(d):
    simple(d / "default/train/0000.parquet", range(3))
    simple(d / "default/validation/0000.parquet", range(5, 9))


@case(numbered(range(3)))
def split_at_the_end_of_names(d):
    simple(d / "data_train.parquet", range(3))
    simple(d / "data_val.parquet", range(5, 9))


@case(numbered(range(3)))
def split_in_the_middle_of_names(d):
    simple(d / "cc-train-0001.parquet", range(3))
    simple(d / "cc-test-0001.parquet", range(5, 9))


@case(numbered(range(4)))
def folders_of_tars(d):
    tar(d / "train/0.tar", pairs(range(2)))
    tar(d / "train/1.tar", pairs(range(2, 4)))
    tar(d / "val/0.tar", pairs(range(5, 9)))


@case(numbered(range(6)))
def words_within_words_are_no_splits(d):
    simple(d / "trains.parquet", range(3))
    simple(d / "contest.parquet", range(3, 6))


@case(numbered(range(6)))
def files_without_a_split(d):
    simple(d / "a.parquet", range(3))
    simple(d / "b.parquet", range(3, 6))


@case(numbered(range(3)))
def unnamed_files_beside_a_test(d):
    simple(d / "a.parquet", range(3))
    simple(d / "test.parquet", range(3, 6))


@case([("no 0", 0, 0), ("no 1", 1, 0)])
def image_folders_train_and_test(d):
    folder(d / "train", ["a.png", "b.png"], ["no 0", "no 1"])
    folder(d / "test", ["a.png", "b.png"], ["no 2", "no 3"])


NAMES = ["a boat.png", "a train.png", "a plane.png", "my_test.png", "val.png"]


@case([(name, i, 0) for i, name in enumerate(NAMES)])
def image_names_are_no_splits(d):
    folder(d, NAMES, NAMES)


@case([(name, i, 0) for i, name in enumerate(NAMES)])
def image_names_are_no_splits_csv(d):
    folder(d, NAMES, NAMES, "metadata.csv")


# Columns in several kinds


@case(numbered(range(6)))
def a_tar_of_jpg_and_one_of_png(d):
    tar(d / "a.tar", pairs(range(3)))
    tar(d / "b.tar", pairs(range(3, 6), "png"))


@case(numbered(range(6)))
def kinds_mixed_in_a_tar(d):
    kinds = ("jpg", "png", "jpeg", "webp", "avif", "png")
    tar(d / "a.tar", [x for i, kind in enumerate(kinds) for x in pairs([i], kind)])


@case([("a", 0, 0), ("b", 1, 0), ("c", 2, 0), ("0012", 3, 0)])
def captions_of_several_kinds_in_a_tar(d):
    members = [("0.png", image(0)), ("0.txt", "a"), ("1.caption", "b"), ("1.png", image(1)),
               ("2.png", image(2)), ("2.json", '{"caption": "c", "width": 3}'),
               ("3.json", '{"caption": 0012, "x": 1}'.replace("0012", '"0012"')),
               ("3.png", image(3))]  # fmt: skip
    tar(d / "a.tar", members)


@case(numbered([0, 1]))
def upper_case_suffixes(d):
    tar(
        d / "a.tar",
        [("0.JPG", image(0)), ("0.TXT", "no 0"), ("1.PNG", image(1)), ("1.txt", "no 1")],
    )


@case(numbered([0, 1]))
def dots_in_the_names_of_a_tar(d):
    tar(d / "a.tar", [("x/a.big.0.jpg", image(0)), ("x/a.big.0.txt", "no 0"),
                      ("x/a.big.1.jpg", image(1)), ("x/a.big.1.txt", "no 1")])  # fmt: skip


@case(numbered(range(4)))
def columns_that_differ_between_parquet_files(d):
    simple(d / "a.parquet", range(2))
    parquet(d / "b.parquet", jpg=[stored(image(i)) for i in (2, 3)], txt=["no 2", "no 3"])


@case(numbered([1, 2]), bad=1, said="no text column")
def first_sample_of_a_tar_without_a_caption(d):
    tar(d / "a.tar", [("0.jpg", image(0)), *pairs([1, 2])])


@case(numbered(range(3), sources=1), stage="edit")
def webdataset_of_edits(d):
    tar(d / "a.tar", [x for i in range(3) for x in (
        (f"{i}.src_img.jpg", image(9)), (f"{i}.edited_img.png", image(i)), (f"{i}.txt", f"no {i}"),
    )])  # fmt: skip


@case(numbered(range(3)))
def gzipped_tar(d):
    tar(d / "a.tar.gz", pairs(range(3)), "w:gz")


@case(numbered(range(3)))
def img2dataset_leaves_parquet_and_json_beside_tars(d):
    tar(d / "00000.tar", pairs(range(3)))
    parquet(d / "00000.parquet", url=["x"], caption=["y"])
    write(d / "00000_stats.json", "{}")


@case(numbered(range(2)))
def img2dataset_files(d):
    for name, data in pairs(range(2)):
        write(d / "00000" / name, data)
    write(d / "00000/0000.json", '{"caption": "other"}')
    parquet(d / "00000.parquet", url=["x"], caption=["y"])


@case(numbered(range(3)))
def captions_after_all_images_of_a_tar(d):
    members = list(pairs(range(3)))
    tar(d / "a.tar", members[::2] + members[1::2])


@case(numbered(range(2)))
def folder_that_is_linked_to_itself(d):
    simple(d / "a.parquet", range(2))
    (d / "loop").symlink_to(d, target_is_directory=True)


@case(numbered(range(2)))
def folder_that_is_a_link(d):
    simple(d.parent / "elsewhere/a.parquet", range(2))
    (d / "train").symlink_to(d.parent / "elsewhere", target_is_directory=True)


@case(numbered(range(2)))
def semicolons_in_csv(d):
    folder(d, ["0.png", "1.png"], ["", ""])
    (d / "metadata.jsonl").unlink()
    write(d / "metadata.csv", "file_name;text\n0.png;no 0\n1.png;no 1\n")


@case(numbered(range(2)))
def lines_that_end_as_on_windows(d):
    folder(d, ["0.png", "1.png"], ["no 0", "no 1"])
    data = (d / "metadata.jsonl").read_bytes()
    write(d / "metadata.jsonl", data.replace(b"\n", b"\r\n") + b"\r\n\r\n")


@case([("a\u2028b", 0, 0)])
def other_ends_of_lines_in_a_caption(d):
    write(d / "0.png", image(0))
    write(d / "metadata.jsonl", '{"file_name": "0.png", "text": "a\u2028b"}')


@case(numbered(range(2)))
def dots_before_the_names_of_a_tar(d):
    tar(d / "a.tar", [(f"./{name}", data) for name, data in pairs(range(2))])


@case(numbered(range(2)))
def metadata_in_parquet(d):
    write(d / "0.png", image(0))
    write(d / "1.png", image(1))
    parquet(d / "metadata.parquet", file_name=["0.png", "1.png"], text=["no 0", "no 1"])


# Captions as they are written

WORDS = ["0", "007", "1e5", "1.50", "true", "False", "None", "null", "nan", "NA", "2024-01-02"]


@case([(word, i, 0) for i, word in enumerate(WORDS)])
def words_in_csv(d):
    folder(d, [f"{i}.png" for i in range(len(WORDS))], WORDS, "metadata.csv")


@case([(word, i, 0) for i, word in enumerate(WORDS)])
def words_in_jsonl(d):
    folder(d, [f"{i}.png" for i in range(len(WORDS))], WORDS)


@case([("0", 0, 0), ("1.50", 1, 0), ("true", 2, 0), ("123456789012345678901", 4, 0)], bad=1,
      said="an empty caption")  # fmt: skip
def json_values(d):
    for i in range(5):
        write(d / f"{i}.png", image(i))
    texts = ["0", "1.50", "true", "null", "123456789012345678901"]
    lines = [f'{{"file_name": "{i}.png", "text": {text}}}' for i, text in enumerate(texts)]
    write(d / "metadata.jsonl", "\n".join(lines))


@case([("3", 0, 0), ("4", 1, 0)])
def integers_in_parquet(d):
    parquet(d / "a.parquet", image=[stored(image(0)), stored(image(1))], caption=[3, 4])


@case([("a, b", 0, 0)], bad=1, said="quote captions")
def commas_in_csv(d):
    write(d / "0.png", image(0))
    write(d / "1.png", image(1))
    write(d / "metadata.csv", 'file_name,text\n0.png,"a, b"\n1.png,a, b\n')


# One row costs one row


@case(numbered([0, 1, 3]), bad=1, said="metadata.jsonl row 2: not a TIFF file")
def damaged_exif(d):
    folder(d, [f"{i}.png" for i in range(4)], [f"no {i}" for i in range(4)])
    write(d / "2.png", EXIF)


@case(numbered([0]), bad=4, said="cannot identify")
def broken_images(d):
    parquet(d / "a.parquet", image=[stored(x) for x in (image(0), BROKEN, CUT, b"", BROKEN)],
            caption=[f"no {i}" for i in range(5)])  # fmt: skip


@case(numbered([0]), bad=3, said="an empty caption")
def empty_captions(d):
    parquet(d / "a.parquet", image=[stored(image(i)) for i in range(4)],
            caption=["no 0", "", " \n", None])  # fmt: skip


@case(numbered([0, 2]), bad=1, said="No such file")
def missing_file(d):
    folder(d, ["0.png", "1.png", "2.png"], ["no 0", "no 1", "no 2"])
    (d / "1.png").unlink()


@case(numbered([0, 2]), bad=1)
def caption_that_is_not_utf8(d):
    tar(d / "a.tar", [("0.png", image(0)), ("0.txt", "no 0"), ("1.png", image(1)),
                      ("1.txt", b"\xff\xfe"), ("2.png", image(2)), ("2.txt", "no 2")])  # fmt: skip


@case(numbered([0, 2]), bad=1)
def half_of_a_surrogate_pair(d):
    folder(d, ["0.png", "1.png", "2.png"], ["no 0", "\ud800", "no 2"])


@case(numbered([0, 2]), bad=1)
def line_that_is_not_json(d):
    folder(d, ["0.png", "1.png", "2.png"], ["no 0", "x", "no 2"])
    lines = (d / "metadata.jsonl").read_text().split("\n")
    write(d / "metadata.jsonl", "\n".join([lines[0], "[" * 200_000, lines[2]]))


@case(numbered([0, 1], sources=1), bad=2, said="7 source images", stage="instruct")
def wrong_numbers_of_sources(d):
    parquet(d / "a.parquet", source_images=[[stored(image(9))]] * 2 + [[stored(image(9))] * 7, []],
            target_image=[stored(image(i)) for i in range(4)],
            prompt=[f"no {i}" for i in range(4)])  # fmt: skip


# Images and captions in other forms


@case(numbered([0, 1]))
def plain_bytes(d):
    parquet(d / "a.parquet", image=[image(0), image(1)], caption=["no 0", "no 1"])


@case(numbered([0, 1]))
def paths_relative_to_the_file(d):
    write(d / "sub/images/0.png", image(0))
    write(d / "sub/images/1.png", image(1))
    parquet(d / "sub/a.parquet", image=["images/0.png", "images/1.png"], caption=["no 0", "no 1"])


@case(numbered([0, 1]))
def paths_relative_to_the_folder(d):
    write(d / "images/0.png", image(0))
    write(d / "images/1.png", image(1))
    table(d / "lists/a.jsonl", [{"image": f"images/{i}.png", "text": f"no {i}"} for i in (0, 1)])


@case(numbered([0, 1]))
def json_list(d):
    write(d / "0.png", image(0))
    write(d / "1.png", image(1))
    rows = [{"image": f"{i}.png", "caption": f"no {i}"} for i in (0, 1)]
    write(d / "captions.json", json.dumps(rows, indent=1))


@case(numbered([0]))
def base64_text(d):
    table(d / "a.jsonl", [{"image": base64.b64encode(image(0)).decode(), "text": "no 0"}])


@case([("x", 0, 0), ("z", 1, 0)])
def lists_of_captions(d):
    parquet(d / "a.parquet", image=[stored(image(0)), stored(image(1))],
            caption=[["x", "y"], ["", "z"]])  # fmt: skip


@case([("short", 0, 1)], stage="edit")
def last_prompt_of_omniedit(d):
    parquet(d / "a.parquet", src_img=[stored(image(9))], edited_img=[stored(image(0))],
            edited_prompt_list=[["long", "short"]])  # fmt: skip


@case(numbered([0, 1]) + [("b", 2, 0)], bad=1, said="no text column")
def kohya_captions(d):
    for i in range(2):
        write(d / f"10_dog/{i}.png", image(i))
        write(d / f"10_dog/{i}.txt", f"no {i}")
    write(d / "10_dog/a.b.png", image(2))
    write(d / "10_dog/a.b.caption", "b")
    write(d / "10_dog/a.png", image(3))


@case(numbered([0, 1]))
def hidden_files(d):
    tar(d / "a.tar", [("._0.jpg", b"x"), *pairs([0]), ("x/.DS_Store", b"x"), *pairs([1])])
    write(d / "._a.tar", b"x")
    write(d / ".cache/b.tar", b"x")
    write(d / ".DS_Store", b"x")


@case(numbered([0, 1]))
def hidden_images(d):
    folder(d, ["0.png", "1.png"], ["no 0", "no 1"])
    (d / "metadata.jsonl").unlink()
    for i in (0, 1):
        write(d / f"{i}.txt", f"no {i}")
    write(d / "._0.png", b"x")
    write(d / "._0.txt", b"x")


@case(numbered([0, 1]))
def byte_order_marks(d):
    folder(d, ["0.png", "1.png"], ["no 0", "no 1"])
    write(d / "metadata.jsonl", b"\xef\xbb\xbf" + (d / "metadata.jsonl").read_bytes())


@case(numbered(range(3)))
def saved_to_disk(d):
    rows = {"image": [stored(image(i)) for i in range(3)], "text": [f"no {i}" for i in range(3)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(d)


@case(numbered(range(2), sources=2), stage="instruct")
def metadata_with_several_files(d):
    for i in range(4):
        write(d / f"{i}.png", image(i))
    rows = [{"source_images_file_names": ["2.png", "3.png"], "prompt": f"no {i}",
             "target_image_file_name": f"{i}.png"} for i in (0, 1)]  # fmt: skip
    table(d / "metadata.jsonl", rows)


# Other people's folders


@case(numbered(range(2)))
def split_folders_in_capitals(d):
    simple(d / "Train/0.parquet", range(2))
    simple(d / "Val/0.parquet", [5])


@case(numbered(range(2)))
def split_files_in_capitals(d):
    simple(d / "TRAIN.parquet", range(2))
    simple(d / "TEST.parquet", [5])


@case(numbered(range(2)))
def shards_of_the_hub(d):
    for i in range(2):
        simple(d / f"data/train-0000{i}-of-00002.parquet", [i])
    simple(d / "data/test-00000-of-00001.parquet", [5])


@case(numbered(range(4)))
def metadata_in_subfolders(d):
    for name, numbers in (("cats", (0, 1)), ("dogs", (2, 3))):
        for i in numbers:
            write(d / name / f"{i}.png", image(i))
        rows = [{"file_name": f"{i}.png", "text": f"no {i}"} for i in numbers]
        table(d / name / "metadata.jsonl", rows)


@case(numbered(range(3)))
def img2dataset_files_with_status(d):
    for i in range(3):
        write(d / f"00000/{i}.jpg", image(i, "JPEG"))
        write(d / f"00000/{i}.json", json.dumps({"caption": f"no {i}", "status": "success"}))
    write(d / "00000/3.json", '{"caption": "x", "status": "failed_to_download"}')
    write(d / "00000_stats.json", "{}")


@case(numbered(range(2)))
def img2dataset_parquet(d):
    parquet(d / "00000.parquet", url=["u", "u"], caption=["no 0", "no 1"], key=["0", "1"],
            status=["success"] * 2, jpg=[image(i, "JPEG") for i in range(2)])  # fmt: skip


@case(numbered(range(2)))
def kohya_files_beside(d):
    for i in range(2):
        write(d / f"10_dog/{i}.png", image(i))
        write(d / f"10_dog/{i}.txt", b"\xef\xbb\xbfno %d\r\n" % i)
        write(d / f"10_dog/{i}.npz", b"x")
    write(d / "LICENSE.txt", "free")


@case([("no 0", 0, 0), ("no 0", 7, 0), ("no 1", 1, 0)])
def images_of_two_kinds_with_one_stem(d):
    for name, i in (("0.png", 0), ("0.jpg", 7), ("1.png", 1)):
        write(d / name, image(i, "PNG" if name.endswith("png") else "JPEG"))
    write(d / "0.txt", "no 0")
    write(d / "1.txt", "no 1")


@case(numbered(range(2)), bad=1, said="skipped 2: [Errno 2] No such file")
def link_to_no_image(d):
    for i in range(2):
        write(d / f"{i}.png", image(i))
    for i in range(3):
        write(d / f"{i}.txt", f"no {i}")
    (d / "2.png").symlink_to("/nowhere.png")


@case(numbered(range(3)))
def suffixes_of_mixed_case(d):
    for i, (suffix, kind) in enumerate([("JPG", "JPEG"), ("Png", "PNG"), ("WebP", "WEBP")]):
        write(d / f"{i}.{suffix}", image(i, kind))
        write(d / f"{i}.Txt", f"no {i}")


@case(numbered(range(3)))
def names_that_are_not_ascii(d):
    for i, name in enumerate(["ä", "猫", "a b c"]):
        write(d / f"{name}.png", image(i))
        write(d / f"{name}.txt", f"no {i}")


@case([("RGB", 3, 0), ("P", 3, 0), ("RGBA", 3, 0), ("CMYK", 3, 0), ("I;16", 3, 0), ("GIF", 3, 0)])
def modes_of_images(d):
    whole = Image.new("RGB", (20, 16), (30, 99, 200))
    deep = Image.new("I;16", (20, 16), 30 * 257)
    other = Image.new("RGB", (20, 16))
    for name, file in {
        "RGB": whole, "P": whole.quantize(), "RGBA": whole.convert("RGBA"),
        "CMYK": whole.convert("CMYK"), "I;16": deep,
    }.items():  # fmt: skip
        file.save(d / f"{name}.tiff")
    whole.save(d / "GIF.gif", save_all=True, append_images=[other])
    for path in [*d.iterdir()]:
        write(path.with_suffix(".txt"), path.stem)


@case(numbered(range(2)))
def captions_in_either_of_two_columns(d):
    parquet(d / "a.parquet", image=[stored(image(i)) for i in range(2)],
            caption=["no 0", None], text=[None, "no 1"])  # fmt: skip


@case(numbered(range(2)))
def lists_of_lists_of_captions(d):
    parquet(d / "a.parquet", image=[stored(image(i)) for i in range(2)],
            captions=[[[f"no {i}", "b"], ["c"]] for i in range(2)])  # fmt: skip


@case(numbered(range(2)))
def open_clips_tsv(d):
    write(d / "imgs/0.png", image(0))
    write(d / "imgs/1.png", image(1))
    write(d / "a.tsv", "filepath\ttitle\nimgs/0.png\tno 0\nimgs/1.png\tno 1\n")


@case(numbered(range(2)))
def paths_on_windows(d):
    write(d / "imgs/0.png", image(0))
    write(d / "imgs/1.png", image(1))
    write(d / "a.csv", "image_path,caption\nimgs\\0.png,no 0\nimgs\\1.png,no 1\n")


@case(numbered(range(2)))
def spaces_and_quotes_in_a_csv_header(d):
    write(d / "0.png", image(0))
    write(d / "1.png", image(1))
    write(d / "a.csv", '"image", "caption", "a;b;c;d"\n0.png, no 0, x\n1.png, no 1, y\n')


@case([("no\n0", 0, 0)], bad=1, said="a.csv row 1: an empty caption")
def csv_rows_of_two_lines_and_of_one_field(d):
    write(d / "0.png", image(0))
    write(d / "a.csv", 'image,caption\n0.png,"no\n0"\n0.png\n')


@case(numbered(range(2)))
def addresses_of_files(d):
    rows = []
    for i in range(2):
        write(d.parent / f"elsewhere/{i}.png", image(i))
        rows.append({"image": f"file://{d.parent}/elsewhere/{i}.png", "text": f"no {i}"})
    table(d / "a.jsonl", rows)


@case(numbered(range(2)))
def arrow_file_format(d):
    batch = pa.record_batch({"image": [image(0), image(1)], "text": ["no 0", "no 1"]})
    with pa.OSFile(str(d / "a.arrow"), "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)


@case(numbered(range(2)))
def image_structs_without_a_path(d):
    images = pa.array([{"bytes": image(i)} for i in range(2)])
    pq.write_table(pa.table({"image": images, "text": ["no 0", "no 1"]}), d / "a.parquet")


@case(numbered(range(2)), bad=1, said="2 target images")
def several_targets_in_a_row(d):
    images = [[stored(image(0))], [stored(image(1))], [stored(image(2))] * 2]
    parquet(d / "a.parquet", image=images, caption=["no 0", "no 1", "no 2"])


@case(numbered(range(2), sources=1), stage="edit")
def columns_of_instruct_pix2pix(d):
    parquet(d / "a.parquet", original_image=[stored(image(9))] * 2, edit_prompt=["no 0", "no 1"],
            edited_image=[stored(image(i)) for i in range(2)])  # fmt: skip


@case(numbered(range(2)))
def folders_in_a_tar(d):
    with tarfile.open(d / "a.tar", "w") as file:
        header = tarfile.TarInfo("x")
        header.type = tarfile.DIRTYPE
        file.addfile(header)
        for name, data in pairs(range(2)):
            data = data if isinstance(data, bytes) else data.encode()
            header = tarfile.TarInfo(f"x/{name}")
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))


@case(numbered(range(2)))
def downloads_that_have_not_ended(d):
    simple(d / "a.parquet", range(2))
    for name in ("b.parquet.incomplete", "c.tar.part", "a.parquet.lock", "_SUCCESS"):
        write(d / name, b"x")


@both
@pytest.mark.parametrize("name", CASES)
def test_rows_of(name, streaming, tmp_path, capsys):
    spec = CASES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    spec.build(folder)
    check(folder, streaming, spec.rows, spec.stage)

    said = capsys.readouterr().err
    assert spec.said in said
    if spec.bad:
        total = spec.bad + len(spec.rows)
        assert f"in epoch 1 skipped {spec.bad} of {total} rows, first" in said
    else:
        assert "skipped" not in said


# ---- Shards ----------------------------------------------------------------------------------


@both
def test_damaged_shards_are_named_and_counted(tmp_path, streaming, capsys):
    for shard in range(6):
        simple(tmp_path / f"{shard}.parquet", range(shard * 4, shard * 4 + 4))
    damage(tmp_path / "2.parquet", 50)
    (tmp_path / "4.parquet").write_bytes(b"")
    rows = [row for row in numbered(range(24)) if row[1] // 4 not in (2, 4)]
    check(tmp_path, streaming, rows)
    said = capsys.readouterr().err
    for shard in (2, 4):
        assert re.search(rf"skipped {shard}.parquet: unreadable shard after 0 rows", said)
    assert "in epoch 1 skipped 0 of 16 rows and 2 of 6 shards, first" in said


@both
@pytest.mark.parametrize("kind", ["cut", "cut between files", "damaged header"])
def test_damaged_tars_give_the_rows_before(tmp_path, streaming, kind, capsys):
    tar(tmp_path / "a.tar", pairs(range(4)))
    tar(tmp_path / "b.tar", pairs(range(4, 8)))
    with tarfile.open(tmp_path / "a.tar") as file:
        member = file.getmember("0002.jpg")
    data = (tmp_path / "a.tar").read_bytes()
    end = {"cut": member.offset_data + 10, "cut between files": member.offset}.get(kind)
    if end:
        (tmp_path / "a.tar").write_bytes(data[:end])
    else:
        damage(tmp_path / "a.tar", member.offset)
    rows = numbered([0, 1, *range(4, 8)])
    check(tmp_path, streaming, rows)
    said = capsys.readouterr().err
    assert re.search(r"skipped a.tar: unreadable shard after 2 rows", said)
    assert "skipped 0 of 6 rows and 1 of 2 shards" in said


@both
@pytest.mark.parametrize("lost, skipped", [(2, 0), (99, 1)])
def test_lost_connections_are_tried_again_then_skipped(
    tmp_path, streaming, lost, skipped, monkeypatch, capsys
):
    for shard in range(3):
        tar(tmp_path / f"{shard}.tar", pairs(range(shard * 3, shard * 3 + 3)))
    read_tar, tries = sources.read_tar, []

    def flaky(path):
        for number, member in enumerate(read_tar(path)):
            if path.endswith("1.tar") and number == 2 and len(tries) < lost:
                tries.append(path)
                raise ConnectionResetError("the connection is lost")
            yield member

    monkeypatch.setattr(sources, "read_tar", flaky)
    gone = {3, 4, 5} if skipped else set()
    check(tmp_path, streaming, numbered([i for i in range(9) if i not in gone]))
    said = capsys.readouterr().err
    assert ("unreadable shard after 0 rows (the connection is lost)" in said) == bool(skipped)


# ---- The processor, mixing, names ------------------------------------------------------------


@both
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_the_processor_refuses_costs_its_row(tmp_path, streaming, batch_size, capsys):
    simple(tmp_path / "a.parquet", range(8))
    collate = See("pretrain", refuse="no 5")
    rows = see(tmp_path, 8 // batch_size, collate=collate, streaming=streaming,
               batch_size=batch_size)  # fmt: skip
    assert len(rows) == 8 and {row[1] for row in rows} == set(range(8)) - {5}
    assert "skipped a.parquet row 5: the processor refuses it" in capsys.readouterr().err


@both
def test_schemas_are_mixed(tmp_path, streaming):
    parquet(tmp_path / "omni/x.parquet", src_img=[stored(image(9))] * 4,
            edited_img=[stored(image(i)) for i in range(4)],
            edited_prompt_list=[["long", f"no {i}"] for i in range(4)])  # fmt: skip
    parquet(tmp_path / "magic/x.parquet", before=[stored(image(9))] * 4,
            after=[stored(image(i)) for i in range(4, 8)],
            words=[f"no {i}" for i in range(4, 8)])  # fmt: skip
    columns = {"text": ",words", "target": ",after", "sources": ",before"}
    data = f"{tmp_path}/omni=1,{tmp_path}/magic=1"
    options = {"streaming": streaming, "columns": columns, "stage": "edit"}
    assert Counter(see(data, 8, **options)) == Counter(numbered(range(8), sources=1))
    rows = see(f"{tmp_path}/omni=3,{tmp_path}/magic=1", 16, **options)
    assert sum(row[1] < 4 for row in rows) == 12
    with pytest.raises(InputError, match="2 names for 1 datasets"):
        see(tmp_path / "omni", 1, columns={"text": "a,b"})


@both
def test_config_and_split(tmp_path, streaming):
    for split, numbers in (("train", [0, 1]), ("val", [2, 3]), ("extra", [4, 5])):
        simple(tmp_path / f"en/{split}/0.parquet", numbers)
    simple(tmp_path / "fr/train/0.parquet", [6, 7])
    for suffix, numbers in (("", [0, 1, 6, 7]), (":en", [0, 1]), (":fr@train", [6, 7]),
                            ("@validation", [2, 3]), (":en@extra", [4, 5])):  # fmt: skip
        check(f"{tmp_path}{suffix}", streaming, numbered(numbers))
    with pytest.raises(InputError, match="cannot read --data"):
        see(f"{tmp_path}@test", 1, streaming=streaming)


@both
def test_readme_of_a_local_copy_decides(tmp_path, streaming):
    simple(tmp_path / "x/one.parquet", [0, 1])
    simple(tmp_path / "x/two.parquet", [2, 3])
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: c\n  data_files:\n"
          "  - split: train\n    path: x/one.parquet\n  - split: hard\n    path: x/two.parquet\n"
          "---\n")  # fmt: skip
    check(tmp_path, streaming, numbered([0, 1]))
    check(f"{tmp_path}:c@hard", streaming, numbered([2, 3]))
    with pytest.raises(InputError, match="its splits are train, hard"):
        see(f"{tmp_path}@other", 1, streaming=streaming)


def hub(monkeypatch, files, splits=None):
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files=files), info=SimpleNamespace(splits=splits), base_path=""
    )
    monkeypatch.setattr(sources, "load_dataset_builder", lambda name, config: builder)


@both
def test_hub_id_reads_the_files_that_datasets_names(tmp_path, streaming, monkeypatch):
    simple(tmp_path / "a.parquet", range(3))
    tar(tmp_path / "b.tar", pairs(range(3, 6)))
    hub(
        monkeypatch,
        {"train": [f"file://{tmp_path}/b.tar"], "test": [f"file://{tmp_path}/a.parquet"]},
    )
    check("someone/name", streaming, numbered(range(3, 6)))
    check("someone/name:x@test", streaming, numbered(range(3)))
    with pytest.raises(InputError, match="its splits are train, test: write NAME@SPLIT"):
        see("someone/name@val", 1, streaming=streaming)


def test_names_that_look_like_weights(tmp_path):
    for name in ("run.png=1", "a,b"):
        (tmp_path / name).mkdir()
    assert sources.parse_data(f"{tmp_path}/run.png=1") == [(f"{tmp_path}/run.png=1", None)]
    assert sources.parse_data(f"{tmp_path}/a,b") == [(f"{tmp_path}/a,b", None)]
    assert sources.parse_data(f"x=2,{tmp_path}/run.png=1") == [
        ("x", 2.0),
        (f"{tmp_path}/run.png=1", None),
    ]
    for wrong in ("a=0", "a=nan", "a=inf", "a=-1", "=1", "", "a,,b", "toy,a", "a=x"):
        with pytest.raises(InputError):
            sources.parse_data(wrong)


# ---- Nothing to use --------------------------------------------------------------------------


HOPELESS = {
    "no text column; its columns are image, words: name one with --text-column": lambda d: parquet(
        d / "a.parquet", image=[stored(image(0))], words=["x"]
    ),
    "an empty caption": lambda d: parquet(d / "a.parquet", image=[stored(image(0))], caption=[""]),
    "a caption that is a dict": lambda d: table(d / "a.jsonl", [{"image": "x", "text": {"a": 1}}]),
    "an image that is a list|an image that is a dict|no image": lambda d: table(
        d / "a.jsonl", [{"image": [[1]], "text": "x"}]
    ),
    "cannot identify image": lambda d: parquet(d / "a.parquet", image=[BROKEN], caption=["x"]),
    "the URL of an image": lambda d: table(
        d / "a.jsonl", [{"image": "https://x.org/a.png", "text": "x"}]
    ),
    "no target column, only a URL: download the images": lambda d: parquet(
        d / "a.parquet", URL=["https://x.org/a.png"], TEXT=["x"]
    ),
    "No such file.*gone.png": lambda d: table(d / "a.jsonl", [{"image": "gone.png", "text": "x"}]),
    "2 target images": lambda d: write(d / "a.json", '{"image": ["a", "b"], "text": ["x", "y"]}'),
    "its columns are png: .*; first a.csv row 0: no text column; its columns are image": (
        lambda d: [write(d / "0.png", image(0)), write(d / "a.csv", "image,words\n0.png,x\n")]
    ),
    "unreadable shard": lambda d: write(d / "a.parquet", b"PAR1"),
    "there is no data": lambda d: write(d / "a.doc", b""),
    "it has no rows": lambda d: write(d / "a.jsonl", b""),
}


@both
@pytest.mark.parametrize("reason", HOPELESS)
def test_the_first_rows_own_reason(tmp_path, streaming, reason):
    folder = tmp_path / "data"
    folder.mkdir()
    HOPELESS[reason](folder)
    with pytest.raises(InputError, match=reason) as caught:
        see(folder, 1, streaming=streaming)
    assert "\n" not in str(caught.value)


@both
def test_a_whole_shard_of_broken_rows_ends_no_run(tmp_path, streaming):
    simple(tmp_path / "a.parquet", range(4))
    parquet(tmp_path / "b.parquet", image=[stored(BROKEN)] * 300, caption=["x"] * 300)
    rows = see(tmp_path, 16, streaming=streaming)
    assert {row[1] for row in rows} == set(range(4))


@both
def test_more_readers_than_rows(tmp_path, streaming):
    """Each of 4 processes sees both rows, and no other."""
    simple(tmp_path / "data/a.parquet", range(2))
    for rank in range(4):
        rows = see(tmp_path / "data", 4, streaming=streaming, rank=rank, world=4, batch_size=4)
        assert {row[1] for row in rows} == {0, 1}


def test_errors_of_workers_are_one_line(tmp_path):
    parquet(tmp_path / "a.parquet", image=[stored(BROKEN)], caption=["x"])
    with pytest.raises(InputError, match="first a.parquet row 0: cannot identify") as caught:
        see(tmp_path, 1, workers=1)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(tmp_path):
    simple(tmp_path / "a.parquet", range(2))
    with pytest.raises(InputError, match="no column words; its columns are image, caption"):
        see(tmp_path, 1, columns={"text": "words"})
