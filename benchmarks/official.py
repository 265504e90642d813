"""Others' benchmarks, drawn into the folders that their own scorers read.

    python -m benchmarks.official geneval --data DIR --out DIR
    torchrun --nproc-per-node=8 -m benchmarks.official geneval --data DIR --out DIR --checkpoint C

Processes share the prompts, and pictures that exist are kept, so the same command resumes. Each
reader below says which files it reads from --data and which it writes to --out. Their scorers:

geneval      python evaluation/evaluate_images.py OUT --outfile r.jsonl --model-path DETECTOR, then
             evaluation/summary_scores.py r.jsonl (github.com/djghosh13/geneval)
dpg          python dpg_bench/compute_dpg_bench.py --image-root-path OUT --resolution 512
             --pic-num 4 (github.com/TencentQQGYLab/ELLA)
wise         gpt_eval.py on OUT, then Calculate.py (github.com/PKU-YuanGroup/WISE)
commonsense  its evaluation script on OUT/plain and OUT/negative (CommonsenseT2I on the hub)
mjhq, coco, imagenet   FID: fid.compute_fid(OUT, REFERENCE) of clean-fid, or fidelity of
             torch-fidelity, against MJHQ-30K's pictures, COCO's val2014, or the given folder
dreambench   DINO, CLIP-I and CLIP-T between OUT/SUBJECT/ and the subject's own pictures

The paper does not give its guidance for each: the defaults are 3.0 and 1.5 throughout.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.command_line import (
    BATCH,
    DRAWING_BOUNDS,
    add_drawing_options,
    begin,
    check_bounds,
    draw,
    errors_in_one_line,
    load_model,
    writable,
)
from data.pictures import grid, open_picture, save_picture
from metaquery import InputError


@dataclass
class Item:
    """One prompt of a benchmark and the files that its pictures go to, below --out.

    `sheet` is a file for all of them in one 2x2 grid; `notes` are text files to write with them.
    """

    prompt: str
    files: list
    images: list = field(default_factory=list)
    negative_prompt: str = ""
    sheet: str = ""
    notes: dict = field(default_factory=dict)

    def is_in(self, out):
        """Whether all its pictures are in a folder."""
        files = [*self.files, self.sheet] if self.sheet else self.files
        return all((out / file).exists() for file in files)

    def drawn_with(self):
        """What items must agree in to be drawn in one batch."""
        return len(self.files), self.negative_prompt


def find(data, names):
    """The first of some files in a folder, or `data` itself where it is a file."""
    if data.is_file():
        return data
    for name in names:
        if found := sorted(data.glob(name)):
            return found[0]
    raise FileNotFoundError(f"no {' or '.join(names)}")


def geneval(data):
    """evaluation_metadata.jsonl; 00000/metadata.jsonl, samples/0000.png … 0003.png and a grid."""
    path = find(data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"))
    for i, line in enumerate(path.read_text().strip().splitlines()):
        files = [f"{i:05d}/samples/{k:04d}.png" for k in range(4)]
        notes = {f"{i:05d}/metadata.jsonl": line + "\n"}
        yield Item(json.loads(line)["prompt"], files, sheet=f"{i:05d}/grid.png", notes=notes)


def dpg(data):
    """A folder of prompts, one .txt each; NAME.png, a 2x2 grid of four pictures without a gap."""
    folder = data / "prompts" if (data / "prompts").is_dir() else data
    for path in sorted(folder.glob("*.txt")):
        files = [f".parts/{path.stem}-{k}.png" for k in range(4)]
        yield Item(path.read_text().strip(), files, sheet=f"{path.stem}.png")


def wise(data):
    """data/*.json, lists of {"Prompt", "prompt_id"}; PROMPT_ID.png."""
    folder = data / "data" if (data / "data").is_dir() else data
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    for row in rows:
        yield Item(row["Prompt"], [f"{row['prompt_id']}.png"])


def commonsense(data):
    """Rows of prompt1, prompt2; INDEX/prompt1_0.png … prompt2_3.png, in plain/ and negative/.

    In negative/ each prompt of a pair is the other's negative prompt.
    """
    if data.suffix == ".jsonl":
        rows = [json.loads(line) for line in data.read_text().strip().splitlines()]
    elif data.suffix == ".json":
        rows = json.loads(data.read_text())
    else:
        from datasets import load_dataset

        files = [str(path) for path in sorted(data.rglob("*.parquet"))]
        rows = load_dataset("parquet", data_files=files, split="train")
    for way in ("plain", "negative"):
        for i, row in enumerate(rows):
            for one, other in (("prompt1", "prompt2"), ("prompt2", "prompt1")):
                files = [f"{way}/{i:03d}/{one}_{k}.png" for k in range(4)]
                negative = row[other] if way == "negative" else ""
                yield Item(row[one], files, negative_prompt=negative)


def mjhq(data):
    """meta_data.json, {id: {"category", "prompt"}}; CATEGORY/ID.png, for FID to its pictures."""
    for name, row in json.loads(find(data, ("meta_data.json",)).read_text()).items():
        yield Item(row["prompt"], [f"{row['category']}/{name}.png"])


def coco(data):
    """captions_val2014.json; IMAGE_ID.png from each picture's first caption, 30,000 of them."""
    path = find(data, ("captions_val2014.json", "annotations/captions_val2014.json"))
    first = {}
    for row in json.loads(path.read_text())["annotations"]:
        first.setdefault(row["image_id"], row["caption"])
    for number in sorted(first)[:30000]:
        yield Item(first[number], [f"{number:012d}.png"])


def imagenet(data):
    """A folder of pictures, in folders or not; each reconstructed under the same name, as .png."""
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    for path in sorted(path for path in data.rglob("*") if path.suffix.lower() in kinds):
        name = str(path.relative_to(data).with_suffix(".png"))
        yield Item("", [name], images=[path])


def dreambench(data):
    """DreamBooth's dataset/; SUBJECT/PROMPT_0.png … 3.png from each subject's first picture.

    prompts_and_classes.txt names the classes, then the prompts for objects and for live subjects.
    """
    data = data / "dataset" if (data / "dataset").is_dir() else data
    text = find(data, ("prompts_and_classes.txt",)).read_text()
    names, prompts = text.split("Prompts", 1)
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", names, re.M))
    classes.pop("subject_name", None)
    objects, live = (
        re.findall(r"'(.+?)'\.format", part) for part in prompts.split("prompt_list", 2)[1:]
    )
    for subject, kind in classes.items():
        picture = sorted(path for path in (data / subject).iterdir() if path.is_file())[0]
        for i, prompt in enumerate(live if kind in ("cat", "dog") else objects):
            prompt = prompt.replace("{0} ", "").replace("{1}", kind)
            files = [f"{subject}/{i:02d}_{k}.png" for k in range(4)]
            yield Item(prompt, files, images=[picture])


@dataclass
class Benchmark:
    """How a benchmark's prompts are read: its reader, and what that expects in --data."""

    read: Callable
    expects: str

    def items(self, data):
        """The items in a folder or file; raises InputError, saying what is expected, if none."""
        try:
            items = list(self.read(Path(data)))
        except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"cannot read --data {data} ({error}): {self.expects}.") from None
        if not items:
            raise InputError(f"--data {data} has no prompts: {self.expects}.")
        check_names([name for item in items for name in (*item.files, item.sheet, *item.notes)])
        return items


def check_names(names):
    """Raise InputError if a file would lie outside --out, or two would be the same."""
    seen = set()
    for name in filter(None, names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise InputError(f"{name!r} lies outside --out: correct that id in --data.")
        if name in seen:
            raise InputError(f"two prompts are drawn to {name!r}: remove one of them from --data.")
        seen.add(name)


OFFICIAL = {
    "geneval": Benchmark(geneval, "geneval expects prompts/evaluation_metadata.jsonl"),
    "dpg": Benchmark(dpg, "dpg expects a folder of prompts, one .txt each"),
    "wise": Benchmark(wise, 'wise expects data/*.json, lists of {"Prompt", "prompt_id"}'),
    "commonsense": Benchmark(
        commonsense, 'commonsense expects rows of "prompt1", "prompt2": .json, .jsonl or parquet'
    ),
    "mjhq": Benchmark(mjhq, 'mjhq expects meta_data.json, {id: {"category", "prompt"}}'),
    "coco": Benchmark(coco, "coco expects annotations/captions_val2014.json"),
    "imagenet": Benchmark(imagenet, "imagenet expects a folder of pictures"),
    "dreambench": Benchmark(
        dreambench, "dreambench expects dataset/: prompts_and_classes.txt and a folder a subject"
    ),
}


def save(item, pictures, out):
    """Write an item's notes, pictures and sheet under `out`, each picture whole or not at all."""
    for name, text in item.notes.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    files = dict(zip(item.files, pictures, strict=True))
    if item.sheet:
        files[item.sheet] = grid(pictures, 2, gap=0)
    for name, picture in files.items():
        save_picture(picture, out / name)


def run(model, items, args):
    """Draw this process's share of a benchmark's items, all that are not in --out yet.

    Each prompt's noise is seeded by --seed and its place in the benchmark, however it is shared.
    Raises InputError at the end if a source picture could not be read.
    """
    out = Path(args.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = dict(list(enumerate(items[: args.limit]))[rank::world])
    missing = {place: item for place, item in share.items() if not item.is_in(out)}
    errors = []
    with tqdm(total=len(missing)) as progress:
        # What is drawn together must agree in the number of pictures and the negative prompt.
        for _, group in groupby(missing, lambda place: missing[place].drawn_with()):
            places = list(group)
            size = max(1, BATCH // len(missing[places[0]].files))
            for start in range(0, len(places), size):
                batch = {place: missing[place] for place in places[start : start + size]}
                draw_items(model, batch, args, out, errors)
                progress.update(len(batch))
    there = len(share) - len(missing)
    print(f"saved {len(missing) - len(errors)} prompts in {out}; {there} were there already")
    if errors:
        raise InputError(" ".join(errors))


def draw_items(model, items, args, out, errors):
    """Draw {place: item} together and save them; source pictures that are bad go to `errors`."""
    rows = {}
    for place, item in items.items():
        try:
            rows[place] = (item.prompt, [open_picture(path) for path in item.images])
        except ValueError as error:
            errors.append(str(error))
    if rows:
        item = items[next(iter(rows))]
        seeds = [args.seed + place for place in rows]
        drawn = draw(model, list(rows.values()), args, seeds, len(item.files), item.negative_prompt)
        for place, pictures in zip(rows, drawn, strict=True):
            save(items[place], pictures, out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    parser.add_argument("name", choices=OFFICIAL, help="which benchmark")
    parser.add_argument("--data", required=True, help="the benchmark's own prompts or pictures")
    parser.add_argument("--out", help="where the pictures go (samples-NAME)")
    parser.add_argument("--limit", type=int, help="the first N prompts only")
    add_drawing_options(parser)
    args = parser.parse_args()
    check_bounds(vars(args), DRAWING_BOUNDS)
    args.out = writable(args.out or f"samples-{args.name}", is_folder=True)
    with errors_in_one_line():
        items = OFFICIAL[args.name].items(args.data)  # before the model, which takes longer
        run(load_model(args), items, args)


if __name__ == "__main__":
    main()
