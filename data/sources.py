"""Where training samples come from: the embedded world, or datasets by hub id or folder.

A sample is (prompt, source pictures, target picture). Datasets are read by `datasets`: webdataset
tars (cc12m-wds), image folders with metadata.csv or .jsonl, parquet, OmniEdit's and
MetaQuery-Instruct's schemas, streamed or not, several of them mixed by weight.
"""

import hashlib
import io
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from datasets import Image, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from PIL import ImageOps
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from data.pictures import rgb
from data.shapes import sample
from data.stages import dropped
from metaquery import MAX_PICTURES, InputError

# Known names of each column; train.py's flags name others.
COLUMNS = {
    "text": ("txt", "text", "caption", "prompt", "edited_prompt_list"),
    "target": ("jpg", "png", "webp", "image", "edited_img", "target_image"),
    "sources": ("src_img", "source_images", "source_image"),
}
SHUFFLE_BUFFER = 1000
MOST_BROKEN = 100
# What tells a run to finish its step, save and end.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Shapes(Dataset):
    """The embedded world's samples: the index alone decides."""

    def __init__(self, kinds, seed):
        self.kinds, self.weights = zip(*kinds.items(), strict=True)
        self.seed = seed

    def __getitem__(self, index):
        """(prompt, source pictures, target picture, 0, index)."""
        kind = random.Random(f"{self.seed} {index}").choices(self.kinds, self.weights)[0]
        made = sample(kind, index, self.seed)
        return made.prompt, made.images, made.picture, 0, index


def open_dataset(name, streaming):
    """A dataset by hub id or folder: tars, parquet files, or pictures with their metadata."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            return load_dataset(name, split="train", streaming=streaming)
        for suffix, builder in ((".tar", "webdataset"), (".parquet", "parquet")):
            files = sorted(str(path) for path in folder.rglob(f"*{suffix}"))
            if files:
                files = {"train": files}
                return load_dataset(builder, data_files=files, split="train", streaming=streaming)
        return load_dataset("imagefolder", data_dir=name, split="train", streaming=streaming)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        mend = "name a hub id, or a folder of .tar or .parquet files or of pictures with captions"
        raise InputError(f"cannot read --data {name} ({reason}): {mend}.") from None


def standard(dataset, name, columns, seeing):
    """A dataset with the columns "text", "target" and, where `seeing`, "sources", undecoded."""
    there, chosen = list(dataset.features or next(iter(dataset))), {}
    for role in ("text", "target", "sources")[: 3 if seeing else 2]:
        wanted = (columns[role],) if columns[role] else COLUMNS[role]
        found = [column for column in wanted if column in there]
        if not found:
            raise InputError(
                f"--data {name} has no column {' or '.join(wanted)} for its {role}; its columns "
                f"are {', '.join(there)}: name one with --{role}-column."
            )
        chosen[found[0]] = role
    dataset = dataset.select_columns(list(chosen))
    for column in chosen:
        if isinstance(dataset.features[column], Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(dataset.features[column], "feature", None), Image):
            plain = type(dataset.features[column])(Image(decode=False))
            dataset = dataset.cast_column(column, plain)
    return dataset.rename_columns({old: new for old, new in chosen.items() if old != new})


def read_row(row, stage, coin):
    """(prompt, source pictures, target picture) of a standard row; raises where it is broken.

    `coin` in [0, 1) decides in the stage "mix" whether the picture is drawn from itself.
    """
    text, target = row["text"], decode(row["target"])
    if stage == "reconstruct" or (stage == "mix" and coin < 0.5):
        return "", [target], target
    text = text[-1] if isinstance(text, list) else text
    if not (isinstance(text, str) and text.strip()):
        raise ValueError("an empty caption")
    sources = row.get("sources") or []
    sources = sources if isinstance(sources, list) else [sources]
    if stage in ("edit", "instruct") and not 1 <= len(sources) <= MAX_PICTURES:
        raise ValueError(f"{len(sources)} source pictures")
    return text, [decode(picture) for picture in sources], target


def decode(value):
    """A picture as `datasets` stores it, {"bytes": ..., "path": ...}, as PIL."""
    data = value["bytes"]
    picture = PILImage.open(io.BytesIO(data) if data else value["path"])
    picture.load()
    return picture


class Examples(Dataset):
    """A dataset on disk, in another order each epoch; broken rows are stepped over and counted."""

    def __init__(self, rows, stage, seed):
        self.rows, self.stage, self.seed, self.order = rows, stage, seed, (None, None)

    def __getitem__(self, index):
        """(prompt, source pictures, target picture, rows stepped over, index)."""
        epoch, place = divmod(index, len(self.rows))
        if self.order[0] != epoch:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self.order = epoch, shuffled
        coin = random.Random(f"{self.seed} {index}").random()
        for skipped in range(MOST_BROKEN):
            row = self.rows[int(self.order[1][(place + skipped * 7919) % len(self.rows)])]
            try:
                return *read_row(row, self.stage, coin), skipped, index
            except Exception:
                continue
        raise too_many_broken()


def too_many_broken():
    return InputError(f"{MOST_BROKEN} broken pictures or empty captions in a row: look at --data.")


class Stream(IterableDataset):
    """A streamed dataset: each rank and worker reads its own share; stepping in is exact.

    `batches` of `share` samples were taken by this rank before; they are read over undecoded.
    """

    def __init__(self, rows, stage, seed, rank, world, batches, share):
        self.rows, self.stage, self.seed = rows, stage, seed
        self.rank, self.world, self.batches, self.share = rank, world, batches, share

    def __iter__(self):
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # The loader asks worker 0 first, whichever was next when the run was left.
        first, worker = worker, (worker + self.batches) % workers
        over = (self.batches - worker + workers - 1) // workers * self.share
        number, epoch, skipped = 0, 0, 0
        while True:
            rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            place = (self.rank * workers + worker, self.world * workers)
            # Its `iter` leaves the splitting between workers to us, its `__iter__` does not.
            for columns in split_dataset_by_node(rows, *place).iter(1):
                row = {name: values[0] for name, values in columns.items()}
                try:
                    coin = random.Random(f"{self.seed} {place} {number}").random()
                    made = read_row(row, self.stage, coin)
                except Exception:
                    skipped += 1
                    if skipped == MOST_BROKEN:
                        raise too_many_broken() from None
                    continue
                number += 1
                if number > over:
                    batch, place_in = divmod(number - over - 1, self.share)
                    batch = self.batches + first + batch * workers
                    index = (batch * self.world + self.rank) * self.share + place_in
                    yield *made, skipped, index
                skipped = 0
            epoch += 1


def noise_of(indices, shape, seed):
    """ε (B, C, h, w), σ (B,) in (0, 1] and chance (B,) in [0, 1): of the index, not of batching."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(hash((seed, int(index))) % (1 << 62))
        sigma, chance = (torch.rand((), generator=generator) for _ in range(2))
        rows.append((torch.randn(shape, generator=generator), 1 - sigma, chance))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def collate(rows, resolution, cache=None):
    """Rows as (prompts, pictures, targets (B, 3, R, R) in [-1, 1], files, stepped over, indices).

    Where `cache` holds the latents of every target, these stand for the targets; `files` are those
    that the latents belong in, or None where there is nothing to write.
    """
    prompts, images, targets, skipped, indices = zip(*rows, strict=True)
    size = (resolution, resolution)
    arrays = [np.asarray(ImageOps.fit(rgb(picture), size)) for picture in targets]
    files = None
    if cache:
        names = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        files = [Path(cache) / name[:2] / f"{name}.npy" for name in names]
        if all(file.exists() for file in files):
            latents = torch.from_numpy(np.stack([np.load(file) for file in files]))
            return prompts, images, latents, None, sum(skipped), indices
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return prompts, images, pixels, files, sum(skipped), indices


def micro_batches(rows, config, prepare, latent, resolution, cache=None):
    """Rows as (micro-batches, rows stepped over), all made in the loader's workers.

    A micro-batch: the MLLM's inputs, targets or their latents, ε of the shape `latent`, σ, files of
    latents to cache. Conditions are dropped as the stage says (DESIGN §3), and prompts of like
    length go together, so that little is padding.
    """
    prompts, images, targets, files, skipped, indices = collate(rows, resolution, cache)
    noise, sigma, chance = noise_of(indices, latent, config.seed)
    rows = zip(prompts, images, chance.tolist(), strict=True)
    prompts, images = zip(*(dropped(config.stage, *row) for row in rows), strict=True)
    order = sorted(range(len(prompts)), key=lambda row: (len(images[row]), len(prompts[row])))
    size, made = config.micro_batch_size or len(order), []
    for start in range(0, len(order), size):
        some = order[start : start + size]
        inputs = prepare([prompts[row] for row in some], [images[row] for row in some])
        tensors = (part[some] for part in (targets, noise, sigma))
        made.append((dict(inputs), *tensors, files and [files[row] for row in some]))
    return made, skipped


def ignore_signals(worker):
    """A loader's worker goes on when its run is told to stop: the run still finishes its step."""
    for name in STOPS:
        signal.signal(name, signal.SIG_IGN)


def cache_folder(folder, model, resolution):
    """Where latents are cached: a folder of its own for every VAE and resolution."""
    made = hashlib.sha256(json.dumps(dict(model.vae.config), sort_keys=True, default=str).encode())
    for name, weights in sorted(model.vae.state_dict().items()):
        made.update(name.encode() + weights.float().cpu().numpy().tobytes())
    return Path(folder) / f"{resolution}-{made.hexdigest()[:16]}"


def cache_latents(latents, files):
    """Write latents (B, C, h, w) to their files, each whole or not at all."""
    for file, array in zip(files, latents.float().cpu().numpy(), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        with open(aside, "wb") as opened:
            np.save(opened, array)
        aside.rename(file)


def resolution_of(model):
    """Pixels a side of the pictures that a MetaQuery's diffusion model draws."""
    vae = model.vae.config
    levels = vae.get("block_out_channels") or vae.encoder_block_out_channels
    return model.diffusion.config.sample_size * 2 ** (len(levels) - 1)


def open_batches(config, kinds, finish, first, rank, world):
    """An iterator over this rank's share of each step's batch from step `first` on.

    `finish` makes a batch of its rows, in the loader's workers. config.data is "shapes", whose
    `kinds` and their weights the stage names, or one or more datasets, "NAME,NAME=WEIGHT,...".
    Raises InputError where one cannot be read.
    """
    share = config.batch_size // world
    sampler = (
        step * config.batch_size + rank * share + i
        for step in range(first, config.steps)
        for i in range(share)
    )
    if config.data == "shapes":
        data = Shapes(kinds, config.seed)
    else:
        named = [part.partition("=") for part in config.data.split(",")]
        columns = {role: getattr(config, f"{role}_column") for role in COLUMNS}
        seeing = config.stage in ("edit", "instruct")
        rows = [
            standard(open_dataset(name, config.streaming), name, columns, seeing)
            for name, _, _ in named
        ]
        weights = np.array([float(weight or 1) for _, _, weight in named])
        mixed = rows[0]
        if len(rows) > 1:
            options = {"seed": config.seed, "stopping_strategy": "all_exhausted"}
            mixed = interleave_datasets(rows, list(weights / weights.sum()), **options)
        if config.streaming:
            data = Stream(mixed, config.stage, config.seed, rank, world, first, share)
            sampler = None
        else:
            data = Examples(mixed, config.stage, config.seed)
    loader = DataLoader(
        data,
        share,
        sampler=sampler,
        collate_fn=finish,
        num_workers=config.workers,
        pin_memory=config.device.startswith("cuda"),
        worker_init_fn=ignore_signals,
    )
    return iter(loader)
