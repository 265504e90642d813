"""Others' benchmarks, drawn into the folders that their own scorers read.

    python -m benchmarks.official geneval --data DIR --out DIR
    torchrun --nproc-per-node=8 -m benchmarks.official geneval --data DIR --out DIR --checkpoint C

Processes share the prompts, and pictures that exist are kept, so the same command resumes. Guidance
is what the paper's authors drew with, 30 steps and bfloat16; flags override it.

name         --data (upstream's own files)         guidance   scorer
geneval      prompts/evaluation_metadata.jsonl     7.5        evaluation/evaluate_images.py OUT
             (djghosh13/geneval)                              --outfile r.jsonl --model-path M, then
                                                              evaluation/summary_scores.py r.jsonl
dpg          dpg_bench/prompts/*.txt               7.5        dpg_bench/compute_dpg_bench.py
             (TencentQQGYLab/ELLA)                            --image-root-path OUT --pic-num 4
                                                              --resolution SIDE
wise         WISE_legacy/data (the paper's), or    7.5        WISE_legacy/gpt_eval.py on OUT, then
             data_verified (corrected later)                  Calculate.py; or vllm_eval.py, then
             (PKU-YuanGroup/WISE)                             calculate_verified.py
commonsense  data.json (CommonsenseT2I on the      7.5        evaluate.py --evaluator clip
             hub; zeyofu/Commonsense-T2I)                     --t2i_model metaquery
                                                              --use_negative_prompt 0, and 1
mjhq         meta_data.json (MJHQ-30K)             3.0        benchmarks.scores OUT mjhq30k_imgs
coco         sayakpaul/coco-30-val-2014, parquet   3.0        benchmarks.scores OUT DATA
imagenet     a folder of pictures                  3.0, 3.0   benchmarks.scores OUT DATA
dreambench   dataset/ (google/dreambooth)          3.0, 1.5   DINO and CLIP-I between OUT/SUBJECT
                                                              and dataset/SUBJECT, CLIP-T with the
                                                              .txt beside each picture

SIDE is the model's own, 512 for the paper's sizes: with another, DPG's scorer reads black tiles.
For commonsense, OUT is that repository's generated_images. The paper's GenEval figures marked †
were drawn from rewritten prompts. Verified here: each layout is read back by its scorer's rules in
tests/test_official.py. Not verified: the scorers' own models, which need a download.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

from PIL import ImageOps
from tqdm import tqdm

from cli import begin, check_bounds, errors_in_one_line, stop, writable
from sample import BATCH, DRAWING_BOUNDS, add_drawing_options, draw, load_model
from sample import SUFFIXES, grid, open_picture, save_picture
from metaquery import InputError, to_rgb


@dataclass
class Item:
    """One prompt of a benchmark and the files that its pictures go to, below --out.

    `sheet` is a file for all `number` of them in one 2x2 grid, `files` are one for each, and
    `notes` are text files to write with them; `square` is the side that source pictures are cut to.
    """

    prompt: str
    files: list = field(default_factory=list)
    number: int = 1
    images: list = field(default_factory=list)
    negative_prompt: str = ""
    sheet: str = ""
    notes: dict = field(default_factory=dict)
    square: int | None = None

    def picture_files(self):
        """All files of pictures."""
        return [*self.files, self.sheet] if self.sheet else self.files

    def is_in(self, out):
        """Whether all its pictures are in a folder."""
        return all((out / file).exists() for file in self.picture_files())

    def drawn_with(self):
        """What items must agree in to be drawn in one batch."""
        return self.number, self.negative_prompt


def find(data, names):
    """The first of some files or folders in a folder, or `data` itself where it is a file."""
    if data.is_file():
        return data
    for name in names:
        if found := sorted(data.glob(name)):
            return found[0]
    raise FileNotFoundError(f"no {' or '.join(names)}")


def read_text(path):
    """The text of a file, which is UTF-8 whatever this machine's locale is."""
    return path.read_text(encoding="utf-8")


def geneval(data):
    """evaluation_metadata.jsonl; 00000/metadata.jsonl, samples/0000.png … 0003.png and a grid."""
    path = find(data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"))
    for i, line in enumerate(read_text(path).strip().splitlines()):
        files = [f"{i:05d}/samples/{k:04d}.png" for k in range(4)]
        notes = {f"{i:05d}/metadata.jsonl": line + "\n"}
        sheet = f"{i:05d}/grid.png"
        yield Item(json.loads(line)["prompt"], files, 4, sheet=sheet, notes=notes)


def dpg(data):
    """A folder of prompts, one .txt each; NAME.png, a 2x2 grid of four pictures without a gap."""
    folder = data
    for name in ("dpg_bench/prompts", "prompts"):
        folder = data / name if (data / name).is_dir() and folder == data else folder
    for path in sorted(folder.glob("*.txt")):
        yield Item(read_text(path).strip(), number=4, sheet=f"{path.stem}.png")


def wise(data, rewrite=False):
    """WISE_legacy/data or data_verified, *.json of {"Prompt", "prompt_id"}; PROMPT_ID.png.

    merge.json repeats the others; *_rewrite.json hold the same ids with the answer written out, and
    are drawn instead if `rewrite`.
    """
    folder = data
    for name in ("WISE_legacy/data", "data", "data_verified"):
        folder = data / name if (data / name).is_dir() and folder == data else folder
    for path in sorted(folder.glob("*.json")):
        if path.stem != "merge" and path.stem.endswith("_rewrite") == rewrite:
            for row in json.loads(read_text(path)):
                yield Item(row["Prompt"], [f"{row['prompt_id']}.png"])


def commonsense(data):
    """data.json, a list or lines of prompt1, prompt2; metaquery_images/ and metaqueryneg_images/,
    each with prompt1_img/original/0001-1.jpg … 0001-4.jpg, and prompt2_img.

    In metaqueryneg_images/ each prompt of a pair is the other's negative prompt.
    """
    text = read_text(find(data, ("data.json", "*.json", "*.jsonl"))).strip()
    rows = json.loads(text) if text[:1] == "[" else map(json.loads, text.splitlines())
    rows = list(rows)
    for folder in ("metaquery_images", "metaqueryneg_images"):
        for i, row in enumerate(rows, 1):
            for one, other in (("prompt1", "prompt2"), ("prompt2", "prompt1")):
                place = f"{folder}/{one}_img"
                files = [f"{place}/original/{i:04d}-{k}.jpg" for k in (1, 2, 3, 4)]
                negative = row[other] if folder == "metaqueryneg_images" else ""
                sheet = f"{place}/{i:04d}.jpg"
                yield Item(row[one], files, 4, negative_prompt=negative, sheet=sheet)


def mjhq(data):
    """meta_data.json, {id: {"category", "prompt"}}; CATEGORY/ID.png, for FID to its pictures."""
    for name, row in json.loads(read_text(find(data, ("meta_data.json",)))).items():
        yield Item(row["prompt"], [f"{row['category']}/{name}.png"])


def coco(data):
    """Parquet files with a column "caption"; 00000.png … in the order of their rows."""
    from datasets import load_dataset

    files = [str(path) for path in sorted(data.rglob("*.parquet"))]
    rows = load_dataset("parquet", data_files=files, split="train").select_columns(["caption"])
    for i, row in enumerate(rows):
        yield Item(row["caption"], [f"{i:05d}.png"])


def imagenet(data):
    """A folder of pictures, in folders or not; each reconstructed under the same name, as .png.

    The source picture is first cut to a square of 384 pixels, for every backbone.
    """
    for path in sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(data).with_suffix(".png"))
        yield Item("", [name], images=[path], square=384)


def dreambench(data):
    """DreamBooth's dataset/; SUBJECT/PROMPT_0.png … 3.png from each subject's first picture, with
    the prompt in PROMPT_0.txt … 3.txt.

    prompts_and_classes.txt names the classes, then the prompts for objects and for live subjects.
    """
    data = data / "dataset" if (data / "dataset").is_dir() else data
    text = read_text(find(data, ("prompts_and_classes.txt",)))
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
            notes = {f"{subject}/{i:02d}_{k}.txt": prompt + "\n" for k in range(4)}
            yield Item(prompt, files, 4, images=[picture], notes=notes)


@dataclass
class Benchmark:
    """How a benchmark is read and drawn: its reader, what that expects in --data, and guidance."""

    read: Callable
    expects: str
    guidance: float
    image_guidance: float = 1.5

    def items(self, data, **options):
        """The items in a folder or file; raises InputError, saying what is expected, if none."""
        try:
            items = list(self.read(Path(data), **options))
        except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"cannot read --data {data} ({error}): {self.expects}.") from None
        if not items:
            raise InputError(f"--data {data} has no prompts: {self.expects}.")
        check_names([name for item in items for name in (*item.picture_files(), *item.notes)])
        return items


def check_names(names):
    """Raise InputError if a file would lie outside --out, or two would be the same."""
    seen = set()
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise InputError(f"{name!r} lies outside --out: correct that id in --data.")
        if name in seen:
            raise InputError(f"two prompts are drawn to {name!r}: remove one of them from --data.")
        seen.add(name)


OFFICIAL = {
    "geneval": Benchmark(geneval, "geneval expects prompts/evaluation_metadata.jsonl", 7.5),
    "dpg": Benchmark(dpg, "dpg expects a folder of prompts, one .txt each", 7.5),
    "wise": Benchmark(wise, "wise expects WISE_legacy/data or data_verified, with *.json", 7.5),
    "commonsense": Benchmark(commonsense, "commonsense expects data.json of its pairs", 7.5),
    "mjhq": Benchmark(mjhq, 'mjhq expects meta_data.json, {id: {"category", "prompt"}}', 3.0),
    "coco": Benchmark(coco, 'coco expects parquet files with a column "caption"', 3.0),
    "imagenet": Benchmark(imagenet, "imagenet expects a folder of pictures", 3.0, 3.0),
    "dreambench": Benchmark(
        dreambench, "dreambench expects dataset/prompts_and_classes.txt and a folder a subject", 3.0
    ),
}


def save(item, pictures, out):
    """Write an item's notes, pictures and sheet under `out`, each picture whole or not at all."""
    for name, text in item.notes.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    files = dict(zip(item.files, pictures, strict=bool(item.files)))
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
            size = max(1, BATCH // missing[places[0]].number)
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
            images = [open_picture(path) for path in item.images]
            if item.square:
                size = (item.square, item.square)
                images = [ImageOps.fit(to_rgb(image), size) for image in images]
            rows[place] = (item.prompt, images)
        except ValueError as error:
            errors.append(str(error))
    if rows:
        item = items[next(iter(rows))]
        seeds = [args.seed + place for place in rows]
        drawn = draw(model, list(rows.values()), args, seeds, item.number, item.negative_prompt)
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
    parser.add_argument("--rewrite", action="store_true", help="wise: draw the rewritten prompts")
    add_drawing_options(parser)
    parser.set_defaults(guidance=None, image_guidance=None, dtype="bfloat16")
    args = parser.parse_args()
    benchmark = OFFICIAL[args.name]
    if args.rewrite and args.name != "wise":
        stop("--rewrite is for wise: leave it out.")
    options = {"rewrite": True} if args.rewrite else {}
    for flag in ("guidance", "image_guidance"):
        if getattr(args, flag) is None:
            setattr(args, flag, getattr(benchmark, flag))
    check_bounds(vars(args), DRAWING_BOUNDS)
    args.out = writable(args.out or f"samples-{args.name}", is_folder=True)
    with errors_in_one_line():
        items = benchmark.items(args.data, **options)  # before the model, which takes longer
        run(load_model(args), items, args)


if __name__ == "__main__":
    main()
