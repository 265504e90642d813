"""Batches of the toy world and of datasets: which rows, in which order, resumed and shared."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from data.batches import Collate, Row, ToyTasks, open_batches
from data.order import Stream, deal, resume_place, turn
from data.sources import Source
from metaquery import InputError, to_pixels
from toy.tasks import MIXTURES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image(number):
    """A 20x16 image that tells its number by its red."""
    return Image.new("RGB", (20, 16), (number, 99, 200))


def save(folder, sizes):
    """Parquet shards with so many rows each, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        captions = [f"no {next(numbers)}" for _ in range(size)]
        rows = {"image": [image(int(c.split()[1]) % 256) for c in captions], "caption": captions}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows.to_parquet(folder / f"{shard:03d}.parquet")
    return folder


def words(prompts, images):
    """A stand-in for PromptFormat."""
    return {"prompts": list(prompts)}


class Numbers(Collate):
    """Collates real batches, and keeps the numbers in the captions."""

    def __init__(self, stage="pretrain"):
        super().__init__(words, 16, (4, 2, 2), stage, 0)

    def __call__(self, rows):
        batch = super().__call__(rows)
        numbers = [int(row.prompt.split()[-1]) for row in rows]
        return batch._replace(micro_batches=[(numbers, batch.micro_batches[0].noise)])


class Run:
    """The processes of a run, each with loader workers, taken a step at a time."""

    def __init__(self, data, world=1, workers=0, first=0, places=None, batch_size=4, **options):
        options = {"streaming": True, "steps": 1000} | options
        self.processes = [
            open_batches(str(data), "pretrain", Numbers(), first=first, batch_size=batch_size,
                         rank=rank, world=world, workers=workers, places=places, **options)
            for rank in range(world)
        ]  # fmt: skip

    def take(self, steps):
        numbers = []
        for _ in range(steps):
            for process in self.processes:
                numbers += next(process).micro_batches[0][0]
        return numbers

    def places(self):
        return json.loads(json.dumps([process.places() for process in self.processes]))


# ---- The toy world and Collate ---------------------------------------------------------------


@pytest.mark.parametrize("stage", MIXTURES)
def test_stages_yield_their_tasks(stage):
    """Different counts of images in one batch; the same index is the same sample."""
    data = ToyTasks(MIXTURES[stage], 0)
    rows = [data[i] for i in range(64)]
    targets = to_pixels([row.target for row in rows], 64)
    assert targets.shape == (64, 3, 64, 64) and targets.min() >= -1 and targets.max() <= 1
    counts = {len(row.images) for row in rows}
    expected = {"pretrain": {0}, "mix": {0, 1}, "instruct": {0, 1, 2}}.get(stage, {1})
    assert expected <= counts <= expected | ({3} if stage == "instruct" else set())
    assert torch.equal(to_pixels([data[5].target], 64)[0], targets[5])
    assert data[5].prompt == rows[5].prompt
    if stage in ("reconstruct", "mix"):
        assert all(not row.prompt for row in rows if row.images)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 0)])
def test_toy_batches_do_not_depend_on_processes(world, workers):
    def samples(world, workers):
        batches = [
            open_batches("toy", "mix", Collate(words, 64, (4, 2, 2), "mix", 0), first=3, steps=5,
                         batch_size=4, rank=rank, world=world, workers=workers)
            for rank in range(world)
        ]  # fmt: skip
        taken = [micro for _ in range(2) for b in batches for micro in next(b).micro_batches]
        assert batches[0].places() is None
        with pytest.raises(StopIteration):
            next(batches[0])
        return sorted(
            (m.u[i].item(), m.inputs["prompts"][i] or "") for m in taken for i in range(len(m.u))
        )

    assert samples(world, workers) == samples(1, 0)


def test_noise_is_seeded_per_sample_and_repeats_nest():
    """The first noise of a sample is the same however many it has, in whatever batch."""
    rows = [Row(f"no {'x' * (9 - i)}", [], image(i), i) for i in range(6)]
    one = Collate(words, 16, (4, 2, 2), "pretrain", 7)(rows).micro_batches
    three = Collate(words, 16, (4, 2, 2), "pretrain", 7, 2, 3)(rows[:4]).micro_batches
    assert len(one) == 1 and one[0].noise.shape == (6, 4, 2, 2) and one[0].u.shape == (6,)
    assert [m.noise.shape[0] for m in three] == [6, 6] and [len(m.targets) for m in three] == [2, 2]
    first = torch.cat([m.u for m in three])[::3]
    assert set(first.tolist()) <= set(one[0].u.tolist())
    generator = torch.Generator().manual_seed(hash((7, 0)) % (1 << 62))
    assert torch.rand((), generator=generator) in one[0].u


# ---- Resuming a stream -----------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1)])
def test_resuming_is_exact(tmp_path, streaming, world, workers):
    """From any step the same batches come as without a break, also where data have moved, and
    where rows are broken."""
    data = save(tmp_path / "a", [7, 5, 6, 8, 3])
    broken = {"image": [b"broken"] * 3, "caption": ["broken"] * 3}
    datasets.Dataset.from_dict(broken).to_parquet(data / "broken.parquet")
    whole = Run(data, world, workers, streaming=streaming).take(12)
    assert whole[:29] != whole[29:]
    if (world, workers) == (1, 0):
        assert Counter(whole[:29]) == Counter(range(29))
    data = data.rename(tmp_path / "b")
    for first in (1, 5):
        run = Run(data, world, workers, streaming=streaming)
        assert run.take(first) == whole[: 4 * first]
        run = Run(data, world, workers, first, run.places(), streaming=streaming)
        assert run.take(12 - first) == whole[4 * first :]
        again = Run(data, world, workers, 12, run.places(), streaming=streaming)
        assert len(again.take(1)) == 4


@pytest.mark.parametrize("before", [(1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("after", [(1, 0), (1, 2), (4, 0)])
@pytest.mark.parametrize("sizes, streaming", [([16] * 4, True), ([64], True), ([64], False)])
def test_other_processes_and_workers_share_what_is_left(tmp_path, before, after, sizes, streaming):
    """64 rows: each is seen once, although the run changes its readers in between, twice."""
    data = save(tmp_path / "a", sizes)
    run = Run(data, *before, streaming=streaming)
    seen = run.take(4)
    run = Run(data, *after, 4, run.places(), streaming=streaming)
    seen += run.take(4)
    run = Run(data, *before, 8, run.places(), streaming=streaming)
    seen += run.take(8)
    assert Counter(seen) == Counter(range(64))


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 3), (5, 1)])
@pytest.mark.parametrize("sizes", [[3, 9, 1, 12, 7, 7], [40], [1] * 40])
def test_uneven_shards_lose_and_double_nothing(tmp_path, before, after, sizes):
    """Each reader, alone, is followed to the end of the epoch: together they see the rest once."""
    source = Source(str(save(tmp_path / "a", sizes)), {"text": "", "target": ""})
    readers = [Stream(source, 0, r, before, [0, []]) for r in range(before)]
    seen = []
    for reader in readers:
        next(reader.rows)
        seen += [row["text"] for row in itertools.islice(reader.rows, 3) if row]
    saved = [{"reader": r, "readers": before, "taken": 0, "streams": [reader.place()]}
             for r, reader in enumerate(readers)]  # fmt: skip
    epochs = {reader.next_epoch for reader in readers}
    assert epochs == {1}
    for r in range(after):
        place = resume_place(saved, [source], 0, r, after)
        reader = Stream(source, 0, r, after, place["streams"][0])
        seen += [row["text"] for row in itertools.takewhile(lambda row: row, reader.rows)]
    assert sorted(seen) == sorted(f"no {i}" for i in range(sum(sizes)))


def test_a_resumed_stream_opens_one_shard_and_decodes_no_unused_image(tmp_path, monkeypatch):
    data = save(tmp_path / "a", [8] * 10)
    run = Run(data)
    run.take(15)
    opened, decoded = [], []
    read, decode = Source.read_raw, Image.open
    monkeypatch.setattr(Source, "read_raw", lambda s, paths: opened.append(paths) or read(s, paths))
    monkeypatch.setattr(Image, "open", lambda file: decoded.append(1) or decode(file))
    Run(data, first=15, places=run.places()).take(1)
    assert len(opened) == 2  # one of them for a look at the columns
    assert len(decoded) == 4


@pytest.mark.parametrize("shards, readers", [(5, 4), (7, 3), (9, 8), (2, 4), (64, 7)])
def test_readers_share_shards(shards, readers):
    """No reader reads more than two shards in vain, and all rows are dealt once."""
    shares = [deal([[0, s, []] for s in range(shards)], r, readers) for r in range(readers)]
    assert max(map(len, shares)) <= shards / readers + 2
    rows = Counter()
    for share in shares:
        for _, shard, cuts in share:
            low, high = (cuts[0][1], cuts[0][2]) if cuts else (0, readers)
            rows.update((shard, i) for i in range(low, high))
    assert rows == Counter(itertools.product(range(shards), range(readers)))


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [1, 2.5, 4], [1e-3, 1, 7, 7]])
def test_turns_follow_the_weights(weights):
    counts = [0] * len(weights)
    for index in range(5000):
        counts[turn(index, weights)] += 1
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - 5000 * weight / sum(weights)) < 3


@pytest.mark.parametrize("world, workers", [(2, 0), (1, 2)])
def test_no_reader_misses_a_source(tmp_path, world, workers):
    """Sources in turn, and readers in turn, do not fall together: all rows of both are seen."""
    save(tmp_path / "a", [8, 8])
    save(tmp_path / "b", [16])
    run = Run(f"{tmp_path}/a=1,{tmp_path}/b=1", world, workers, batch_size=2)
    assert Counter(run.take(16)) == Counter([*range(16), *range(16)])


@pytest.mark.parametrize("streaming", [False, True])
def test_mixing_without_weights_needs_sizes(tmp_path, streaming):
    save(tmp_path / "a", [4])
    save(tmp_path / "b", [12])
    data = f"{tmp_path}/a,{tmp_path}/b"
    if streaming:
        with pytest.raises(InputError, match="NAME=WEIGHT"):
            Run(data)
    else:
        seen = Counter(Run(data, streaming=False).take(4))
        assert seen == Counter([*range(4), *range(12)])


@pytest.mark.parametrize("stage, share", [("reconstruct", 1), ("mix", 0.5)])
def test_images_are_generated_from_themselves(tmp_path, stage, share):
    rows = []
    data = save(tmp_path / "a", [40])

    class Keep(Collate):
        def __call__(self, batch):
            rows.extend(batch)
            return super().__call__(batch)

    batches = open_batches(str(data), stage, Keep(words, 16, (4, 2, 2), stage, 0), steps=50,
                           batch_size=4)  # fmt: skip
    for _ in range(50):
        next(batches)
    assert abs(sum(len(row.images) for row in rows) / len(rows) - share) < 0.1
    assert all((row.prompt == "") == bool(row.images) for row in rows)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_start_in_every_way(tmp_path, start, monkeypatch):
    data = save(tmp_path / "a", [8, 8])
    context = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method(start, force=True)
    try:
        assert Counter(Run(data, workers=1, steps=4).take(4)) == Counter(range(16))
    finally:
        torch.multiprocessing.set_start_method(context or "fork", force=True)
