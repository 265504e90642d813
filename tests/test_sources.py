"""Datasets in the schemas of the paper's sizes: read, mixed, streamed, resumed, and if broken."""

import io
import itertools
import json
import shutil
import sys
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import losses, run
from PIL import Image

from data.batches import Collate, open_batches
from data.sources import Row, open_rows, share_of
from metaquery import InputError
from train import TrainConfig


def picture(number):
    """A 20x16 picture that tells its number by its red."""
    return Image.new("RGB", (20, 16), (number, 99, 200))


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make(folder, kind, number=12, broken=()):
    """A small dataset folder in the layout that `kind` names; rows in `broken` have no picture."""
    folder.mkdir()
    files = [b"broken" if i in broken else as_bytes(picture(i)) for i in range(number)]
    if kind == "webdataset":
        for shard in range(4):
            with tarfile.open(folder / f"cc12m-train-{shard:04d}.tar", "w") as tar:
                for i in range(shard, number, 4):
                    for name, data in ((f"{i:06d}.jpg", files[i]), (f"{i:06d}.txt", f"no {i}")):
                        data = data if isinstance(data, bytes) else data.encode()
                        header = tarfile.TarInfo(name)
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))
        return folder
    if kind.startswith("metadata"):
        for i, data in enumerate(files):
            (folder / f"{i}.png").write_bytes(data)
        rows = [{"file_name": f"{i}.png", "text": f"no {i}"} for i in range(number)]
        if kind == "metadata.csv":
            lines = ["file_name,text", *(f"{r['file_name']},{r['text']}" for r in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        (folder / kind).write_text("\n".join(lines))
        return folder
    image, several = datasets.Image(), datasets.List(datasets.Image())
    stored = [{"bytes": data, "path": None} for data in files]
    before = [{"bytes": as_bytes(picture(100 + i)), "path": None} for i in range(number)]
    text = datasets.Value("string")
    if kind == "parquet":
        columns = {"image": stored, "caption": [f"no {i}" for i in range(number)]}
        features = {"image": image, "caption": text}
    elif kind == "OmniEdit":
        columns = {
            "src_img": before,
            "edited_img": stored,
            "omni_edit_id": ["x"] * number,
            "edited_prompt_list": [["long", f"no {i}"] for i in range(number)],
        }
        features = {
            "src_img": image,
            "edited_img": image,
            "omni_edit_id": text,
            "edited_prompt_list": datasets.List(text),
        }
    else:
        before = [before[: i % 6 + 1] for i in range(number)]
        prompts = [f"no {i}" for i in range(number)]
        columns = {"source_images": before, "target_image": stored, "prompt": prompts}
        features = {"source_images": several, "target_image": image, "prompt": text}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    half = number // 2
    for part, rows in enumerate((range(half), range(half, number))):
        made.select(rows).to_parquet(folder / f"train-{part:05d}-of-00002.parquet")
    return folder


def batches(data, number, first=0, rank=0, world=1, **changes):
    """The rows of the first batches of 4 that a run over `data` sees."""
    config = SimpleNamespace(
        data=str(data),
        stage="pretrain",
        batch_size=4,
        micro_batch_size=0,
        steps=1000,
        seed=0,
        text_column="",
        target_column="",
        sources_column="",
        streaming=False,
        workers=0,
        device="cpu",
    )
    vars(config).update(changes)
    made = open_batches(config, open_rows(config, config.seed), list, first, rank, world)
    return list(itertools.islice(made, number))


def numbers(made):
    return [int(row.prompt.split()[-1]) for batch in made for row in batch]


KINDS = {
    "webdataset": "pretrain",
    "metadata.csv": "pretrain",
    "metadata.jsonl": "pretrain",
    "parquet": "pretrain",
    "OmniEdit": "edit",
    "MetaQuery-Instruct": "instruct",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind, stage", KINDS.items())
def test_every_schema_is_read(tmp_path, kind, stage, streaming):
    """An epoch holds every sample once, each with its own words and pictures."""
    folder = make(tmp_path / "data", kind)
    made = batches(folder, 6, stage=stage, streaming=streaming)
    seen = numbers(made)
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]
    assert {len(batch) for batch in made} == {4}
    for row in (row for batch in made for row in batch):
        number = int(row.prompt.split()[-1])
        assert abs(int(np.asarray(row.target)[0, 0, 0]) - number) < 2
        assert len(row.images) == {"pretrain": 0, "edit": 1, "instruct": number % 6 + 1}[stage]
        assert all(99 < np.asarray(source)[0, 0, 0] < 112 for source in row.images)


@pytest.mark.parametrize("stage, share", [("reconstruct", 1), ("mix", 0.5)])
def test_pictures_are_drawn_from_themselves(tmp_path, stage, share):
    made = batches(make(tmp_path / "data", "parquet"), 50, stage=stage)
    rows = [row for batch in made for row in batch]
    assert abs(sum(len(row.images) for row in rows) / len(rows) - share) < 0.1
    assert all((row.prompt == "") == bool(row.images) for row in rows)


@pytest.mark.parametrize("streaming, workers", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_resuming_is_exact(tmp_path, streaming, workers):
    """From any step, also in the middle of an epoch, the same batches come as without a break."""
    folder = make(tmp_path / "data", "webdataset", 24)
    options = {"streaming": streaming, "workers": workers}
    whole = numbers(batches(folder, 9, **options))
    for first in (1, 4, 7):
        assert numbers(batches(folder, 9 - first, first=first, **options)) == whole[4 * first :]


@pytest.mark.parametrize("streaming, workers", [(False, 0), (True, 0), (True, 2)])
def test_ranks_share_an_epoch(tmp_path, streaming, workers):
    folder = make(tmp_path / "data", "webdataset", 32)
    options = {"world": 2, "streaming": streaming, "workers": workers}
    parts = [numbers(batches(folder, 8, rank=rank, **options)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(32))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_mixed_by_weight(tmp_path, streaming):
    few, many = make(tmp_path / "a", "parquet", 40), tmp_path / "b"
    many.mkdir()
    rows = {"image": [picture(7)] * 40, "caption": [f"no {i}" for i in range(100, 140)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(
        many / "train.parquet"
    )
    seen = numbers(batches(f"{few},{many}=3", 30, streaming=streaming))
    assert 0.55 < sum(number >= 100 for number in seen) / len(seen) < 0.95
    shutil.copy(many / "train.parquet", many / "dev.parquet")
    if streaming:
        with pytest.raises(InputError, match="NAME=WEIGHT"):
            batches(f"{few},{many}", 1, streaming=True)
    else:  # by their sizes, of which the dev split is no part
        seen = numbers(batches(f"{few},{many}", 60))
        assert 0.4 < sum(number >= 100 for number in seen) / len(seen) < 0.6


@pytest.mark.parametrize("shards, readers", [(5, 4), (7, 3), (9, 8), (2, 4)])
def test_each_reader_reads_its_share_of_whole_shards(tmp_path, monkeypatch, shards, readers):
    """All rows are read once in an epoch, and no reader touches over 1.5 times its share."""
    for shard in range(shards):
        rows = {"image": [picture(0)] * 8, "caption": [f"no {8 * shard + i}" for i in range(8)]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows.to_parquet(tmp_path / f"{shard}.parquet")
    dataset = datasets.load_dataset("parquet", data_dir=str(tmp_path), streaming=True)["train"]
    read, touched = [], []
    for reader in range(readers):
        opened = []
        part = share_of(dataset.map(lambda row, o=opened: o.append(1) or row), reader, readers)
        read += [row["caption"] for row in part]
        touched.append(len(opened))
    assert sorted(read) == sorted(f"no {i}" for i in range(8 * shards))
    if shards >= readers:
        whole_shards = -(-shards // readers)
        assert max(touched) <= 8 * whole_shards


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_are_skipped_and_counted(tmp_path, streaming):
    folder = make(tmp_path / "data", "parquet", 12, broken=(3, 8))
    made = batches(folder, 5, streaming=streaming)
    assert (
        not {3, 8} & set(numbers(made)) and sum(row.skipped for batch in made for row in batch) >= 2
    )
    with pytest.raises(InputError, match="in a row"):
        batches(make(tmp_path / "bad", "parquet", 4, range(4)), 1, streaming=streaming)


def test_wrong_data_is_one_line(tmp_path):
    folder = make(tmp_path / "data", "parquet")
    with pytest.raises(InputError, match="its columns are image, caption.*--text-column"):
        batches(folder, 1, text_column="words")
    with pytest.raises(InputError, match="sources"):
        batches(folder, 1, stage="edit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot read --data"):
        batches(tmp_path / "empty", 1)
    with pytest.raises(InputError, match="cannot read --data"):
        batches("nobody/nothing", 1)


def test_columns_may_be_named(tmp_path):
    (tmp_path / "data").mkdir()
    rows = {"a": [picture(i) for i in range(8)], "b": [f"no {i}" for i in range(8)]}
    made = datasets.Dataset.from_dict(rows).cast_column("a", datasets.Image())
    made.to_parquet(tmp_path / "data" / "x.parquet")
    seen = numbers(batches(tmp_path / "data", 2, text_column="b", target_column="a"))
    assert sorted(seen) == list(range(8))


def test_training_on_a_dataset(parts, tmp_path):
    """train.py itself, on a folder, and resumed."""
    folder = make(tmp_path / "data", "webdataset", 16)
    for out, steps in (("a", 4), ("b", 2), ("b", 4)):
        command = [
            sys.executable,
            "train.py",
            "--mllm",
            parts / "llava",
            "--diffusion",
            parts / "sana",
            "--data",
            folder,
            "--streaming",
            "--batch-size",
            4,
            "--steps",
            4,
            "--num-queries",
            4,
            "--connector-layers",
            1,
            "--save-every",
            2,
            "--out",
            tmp_path / out,
        ]
        done = run([str(part) for part in command])
        assert done.returncode == 0, done.stderr
        if steps == 2:
            for name in ("step-00000004", "log.jsonl"):
                run(["rm", "-r", str(tmp_path / out / name)])
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[2:]
    assert torch.isfinite(torch.tensor(losses(tmp_path / "a"))).all()


def test_sigma_shift_raises_the_noise_levels_of_the_same_samples(build):
    rows = [Row(f"no {i}", [], picture(i), 0, i) for i in range(100)]
    model = build()
    uniform, shifted = (
        Collate(model, TrainConfig(sigma_shift=shift))(rows).micro_batches[0].sigma
        for shift in (1.0, 3.0)
    )
    assert abs(uniform.mean() - 0.5) < 0.1
    torch.testing.assert_close(shifted, 3 * uniform / (1 + 2 * uniform))
    assert (shifted >= uniform).all() and shifted.max() <= 1
