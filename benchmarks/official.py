"""Published benchmarks, generated into the folders that their own scorers read.

    python -m benchmarks.official geneval --data DIR --out DIR
    torchrun --nproc-per-node=8 -m benchmarks.official geneval --data DIR --out DIR --checkpoint C

Processes share the prompts, and images that exist are kept, so the same command resumes. Guidance
is what the paper's authors used, with 30 steps; flags override both.

name          --data (upstream's own files)        guidance  scorer
geneval       prompts/evaluation_metadata.jsonl    7.5       evaluation/evaluate_images.py OUT
              (djghosh13/geneval)                            --outfile r.jsonl --model-path M, then
                                                             evaluation/summary_scores.py r.jsonl
dpg           dpg_bench/prompts/*.txt              7.5       dpg_bench/compute_dpg_bench.py
              (TencentQQGYLab/ELLA)                          --image-root-path OUT --pic-num 4
                                                             --resolution SIDE
wise          WISE_legacy/data (the paper's), or   7.5       WISE_legacy/gpt_eval.py on OUT, then
              data_verified (corrected later)                Calculate.py; or vllm_eval.py, then
              (PKU-YuanGroup/WISE)                           calculate_verified.py
wise-rewrite  the same: its own *_rewrite.json     7.5       the same
commonsense   data.json (CommonsenseT2I on the     7.5       evaluate.py --evaluator clip
              hub; zeyofu/Commonsense-T2I)                   --t2i_model metaquery
                                                             --use_negative_prompt 0, and 1
mjhq          meta_data.json (MJHQ-30K)            3.0       benchmarks.scores OUT mjhq30k_imgs
coco          sayakpaul/coco-30-val-2014, parquet  3.0       benchmarks.scores OUT DATA
imagenet      a folder of images                   3.0, 3.0  benchmarks.scores OUT DATA
dreambench    dataset/ (google/dreambooth)         3.0, 1.5  DINO and CLIP-I between OUT/SUBJECT
                                                             and dataset/SUBJECT, CLIP-T with the
                                                             .txt beside each image

SIDE is the model's own, 512 for the paper's sizes: with another, DPG's scorer reads black tiles.
For commonsense, OUT is that repository's generated_images. The paper's GenEval and WISE figures
marked † are of rewritten prompts, and nobody has published how: --rewrite lets the model's own
MLLM write them out, as sample.REWRITE asks. Verified here: each layout is read back by its scorer's
rules in tests/test_official.py. Not verified: the scorers' own models, which need a download.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

from tqdm import tqdm

import cli
from benchmarks import data_files
from metaquery import InputError, resize_and_crop
from sample import (
    SUFFIXES,
    add_generation_options,
    generate,
    grid,
    load_model,
    open_image,
    rewrite,
    save_image,
)


# ---- The benchmarks' own files -------------------------------------------------------------------
@dataclass
class Item:
    """One prompt of a benchmark and the files that its images go to, below --out."""

    prompt: str
    files: list = field(default_factory=list)  # one for each of `number` images
    number: int = 1
    images: list = field(default_factory=list)  # files of source images
    square: int | None = None  # the side that source images are cut to
    negative_prompt: str = ""
    sheet: str = ""  # a file for all images, in a grid of two columns
    notes: dict = field(default_factory=dict)  # text files to write beside them
    source: str = ""  # the file and row that the prompt is from

    def image_files(self):
        if self.sheet:
            return [*self.files, self.sheet]
        return self.files

    def is_in(self, out):
        """Whether all its images are in a folder."""
        return all((out / file).exists() for file in self.image_files())


def find(data, names):
    """The first of some files or folders in a folder, or `data` itself where it is a file."""
    if data.is_file():
        return data
    for name in names:
        found = [path for path in sorted(data.glob(name)) if not path.name.startswith(".")]
        if found:
            return found[0]
    raise FileNotFoundError(f"no {' or '.join(names)}")


def read_text(path):
    """The text of a file, which is UTF-8 whatever this machine's locale is."""
    return path.read_text(encoding="utf-8")


def folder_of(data, names):
    """The first of some folders in `data` that exists, or `data` itself."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    return data


def geneval(data):
    """evaluation_metadata.jsonl; 00000/metadata.jsonl, samples/0000.png … 0003.png and a grid."""
    path = find(data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"))
    for i, line in enumerate(read_text(path).strip().split("\n")):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError, RecursionError):
            prompt = None  # named with its row when its turn comes
        files = [f"{i:05d}/samples/{k:04d}.png" for k in range(4)]
        notes = {f"{i:05d}/metadata.jsonl": line + "\n"}
        source = f"{path} row {i + 1}"
        yield Item(prompt, files, 4, sheet=f"{i:05d}/grid.png", notes=notes, source=source)


def dpg(data):
    """A folder of prompts, one .txt each; NAME.png, a 2x2 grid of four images without a gap."""
    for path in data_files(folder_of(data, ("dpg_bench/prompts", "prompts")), {".txt"}):
        try:
            prompt = read_text(path).strip()
        except UnicodeError:
            prompt = None  # named when its turn comes
        yield Item(prompt, number=4, sheet=f"{path.stem}.png", source=str(path))


def wise(data, rewritten=False):
    """WISE_legacy/data or data_verified, *.json of {"Prompt", "prompt_id"}; PROMPT_ID.png.

    merge.json repeats the others; *_rewrite.json hold the same ids with the answer written out.
    """
    folder = folder_of(data, ("WISE_legacy/data", "data", "data_verified"))
    for path in data_files(folder, {".json"}):
        if path.stem != "merge" and path.stem.endswith("_rewrite") == rewritten:
            for i, row in enumerate(json.loads(read_text(path)), 1):
                yield Item(row.get("Prompt"), [f"{row['prompt_id']}.png"], source=f"{path} row {i}")


def commonsense(data):
    """data.json, a list or lines of prompt1, prompt2; metaquery_images/ and metaqueryneg_images/,
    each with prompt1_img/original/0001-1.jpg … 0001-4.jpg, and prompt2_img.

    In metaqueryneg_images/ each prompt of a pair is the other's negative prompt.
    """
    path = find(data, ("data.json", "*.json", "*.jsonl"))
    text = read_text(path).strip()
    if text.startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n")]

    for folder in ("metaquery_images", "metaqueryneg_images"):
        for i, row in enumerate(rows, 1):
            for one, other in (("prompt1", "prompt2"), ("prompt2", "prompt1")):
                place = f"{folder}/{one}_img"
                files = [f"{place}/original/{i:04d}-{k}.jpg" for k in (1, 2, 3, 4)]
                item = Item(row[one], files, 4, sheet=f"{place}/{i:04d}.jpg")
                item.source = f"{path} row {i}"
                if folder == "metaqueryneg_images":
                    item.negative_prompt = row[other]
                yield item


def mjhq(data):
    """meta_data.json, {id: {"category", "prompt"}}; CATEGORY/ID.png, for FID to its images."""
    path = find(data, ("meta_data.json",))
    for name, row in json.loads(read_text(path)).items():
        file = f"{row['category']}/{name}.png"
        yield Item(row.get("prompt"), [file], source=f"{path} row {name}")


def coco(data):
    """Parquet files with a column "caption"; 00000.png … in the order of their rows."""
    import pyarrow.parquet

    count = 0
    for path in data_files(data, {".parquet"}):
        captions = pyarrow.parquet.read_table(path, columns=["caption"])["caption"]
        for row, caption in enumerate(captions.to_pylist(), 1):
            yield Item(caption, [f"{count:05d}.png"], source=f"{path} row {row}")
            count += 1


def imagenet(data):
    """A folder of images, in folders or not; each reconstructed under the same name, as .png.

    The source image is first cut to a square of 384 pixels, for every backbone.
    """
    for path in data_files(data, SUFFIXES):
        name = str(path.relative_to(data).with_suffix(".png"))
        yield Item("", [name], images=[path], square=384)


def dreambench(data):
    """DreamBooth's dataset/; SUBJECT/PROMPT_0.png … 3.png from each subject's first image, with
    the prompt in PROMPT_0.txt … 3.txt.

    prompts_and_classes.txt names the classes, then the prompts for objects and for live subjects.
    """
    data = folder_of(data, ("dataset",))
    text = read_text(find(data, ("prompts_and_classes.txt",)))
    names, prompts = text.split("Prompts", 1)
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", names, re.M))
    classes.pop("subject_name", None)
    _, objects, live = prompts.split("prompt_list", 2)

    for subject, kind in classes.items():
        first = data_files(data / subject, SUFFIXES)[0]
        part = objects
        if kind in ("cat", "dog"):
            part = live
        for i, prompt in enumerate(re.findall(r"'(.+?)'\.format", part)):
            prompt = prompt.replace("{0} ", "").replace("{1}", kind)
            files = [f"{subject}/{i:02d}_{k}.png" for k in range(4)]
            notes = {f"{subject}/{i:02d}_{k}.txt": prompt + "\n" for k in range(4)}
            yield Item(prompt, files, 4, images=[first], notes=notes)


@dataclass
class Benchmark:
    """How a benchmark is read and generated: its reader, what that expects in --data, guidance."""

    read: Callable
    expects: str
    guidance: float
    image_guidance: float = 1.5

    def items(self, data):
        """The items in a folder or file; raises InputError, saying what is expected, if none."""
        try:
            items = list(self.read(Path(data)))
        except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"cannot read --data {data} ({error}): {self.expects}.") from None
        if not any(isinstance(item.prompt, str) for item in items):
            raise InputError(f"--data {data} has no prompts: {self.expects}.")
        check_names([name for item in items for name in (*item.image_files(), *item.notes)])
        return items


def check_names(names):
    """Raise InputError if a file would lie outside --out, or two would be the same."""
    seen = set()
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise InputError(f"{name!r} lies outside --out: correct that id in --data.")
        if name in seen:
            raise InputError(f"two prompts are for {name!r}: remove one of them from --data.")
        seen.add(name)


WISE = "wise expects WISE_legacy/data or data_verified, with *.json"
REWRITTEN = "wise-rewrite expects WISE_legacy/data, with *_rewrite.json"
DREAMBENCH = "dreambench expects dataset/prompts_and_classes.txt and a folder of images a subject"
OFFICIAL = {
    "geneval": Benchmark(geneval, "geneval expects prompts/evaluation_metadata.jsonl", 7.5),
    "dpg": Benchmark(dpg, "dpg expects a folder of prompts, one .txt each", 7.5),
    "wise": Benchmark(wise, WISE, 7.5),
    "wise-rewrite": Benchmark(partial(wise, rewritten=True), REWRITTEN, 7.5),
    "commonsense": Benchmark(commonsense, "commonsense expects data.json of its pairs", 7.5),
    "mjhq": Benchmark(mjhq, 'mjhq expects meta_data.json, {id: {"category", "prompt"}}', 3.0),
    "coco": Benchmark(coco, 'coco expects parquet files with a column "caption"', 3.0),
    "imagenet": Benchmark(imagenet, "imagenet expects a folder of images", 3.0, 3.0),
    "dreambench": Benchmark(dreambench, DREAMBENCH, 3.0),
}


# ---- Generating them -----------------------------------------------------------------------------
def run(model, items, args):
    """Generate this process's share of a benchmark's items, all that are not in --out yet.

    Each prompt's noise is seeded by --seed and its place in the benchmark, however it is shared.
    Raises InputError at the end if some prompts or source images could not be read.
    """
    out = Path(args.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = list(enumerate(items[: args.limit]))[rank::world]
    missing = [(place, item) for place, item in share if not item.is_in(out)]
    errors = []

    with tqdm(total=len(missing)) as progress:
        for number, group in groupby(missing, lambda pair: pair[1].number):
            group = list(group)
            size = max(1, args.batch_size // number)
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                errors += generate_items(model, batch, args, out)
                progress.update(len(batch))

    count = len(missing) - len(errors)
    print(f"saved {count} prompts in {out}; {len(share) - len(missing)} were there already")
    if errors:
        raise InputError(" ".join(errors))


def generate_items(model, batch, args, out):
    """Generate some (place, item) with as many images each, and save them; returns the errors of
    those that cannot be read."""
    ready, rows, errors = [], [], []
    for place, item in batch:
        try:
            images = [open_image(path) for path in item.images]
            item.prompt.encode()  # fails where it is no text, or half a surrogate pair
        except (AttributeError, UnicodeError):
            errors.append(f"{item.source}: its prompt is no text.")
            continue
        except InputError as error:
            errors.append(str(error))
            continue
        if item.square:
            images = [resize_and_crop(image, item.square) for image in images]
        prompt = item.prompt
        if args.rewrite:
            prompt = rewrite(model, prompt)
        ready.append((place, item))
        rows.append((prompt, images))

    if ready:
        seeds = [args.seed + place for place, _ in ready]
        negative = [item.negative_prompt or args.negative_prompt for _, item in ready]
        results = generate(model, rows, args, seeds, ready[0][1].number, negative)
        for (_, item), (prompt, _), images in zip(ready, rows, results, strict=True):
            save(item, images, prompt, out)
    return errors


def save(item, images, prompt, out):
    """Write an item's notes, images and sheet under `out`, each image whole or not at all."""
    for name, text in item.notes.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    texts = {"prompt": item.prompt}
    if prompt != item.prompt:
        texts["rewritten as"] = prompt

    files = {}
    if item.files:
        files = dict(zip(item.files, images, strict=True))
    if item.sheet:
        files[item.sheet] = grid(images, 2, gap=0)
    for name, image in files.items():
        save_image(image, out / name, **texts)


def main():
    parser = cli.open_parser(__doc__)
    add = parser.add_argument
    add("name", choices=OFFICIAL, help="which benchmark")
    add("--data", required=True, help="the benchmark's own prompts or images")
    add("--out", help="where the images go (samples-NAME)")
    add("--limit", type=cli.bounded(int, 1, 10**9), help="the first N prompts only")
    add("--rewrite", action="store_true", help="geneval, wise: the MLLM writes prompts out first")
    add_generation_options(parser)
    parser.set_defaults(steps=30)
    args = parser.parse_args()

    benchmark = OFFICIAL[args.name]
    if args.rewrite and args.name not in ("geneval", "wise"):
        cli.fail("--rewrite is for geneval and wise: leave it out.")
    if args.num_images != 1:
        cli.fail("--num-images has no effect: each benchmark says how many.")
    if args.guidance is None:
        args.guidance = benchmark.guidance
    if args.image_guidance is None:
        args.image_guidance = benchmark.image_guidance
    if args.out is None:
        args.out = f"samples-{args.name}"
    cli.check_writable(args.out, is_folder=True)

    with cli.errors_in_one_line():
        items = benchmark.items(args.data)  # before the model, which takes longer
        model = load_model(args)
        print(f"{args.name}: computing in {args.dtype}, {args.why}")
        run(model, items, args)


if __name__ == "__main__":
    main()
