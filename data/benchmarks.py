"""Benchmarks: the embedded world's, scored here, and others', drawn as their own scorers read them.

For the latter, torchrun's processes share the prompts, and pictures that exist are kept.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from data.pictures import grid, open_picture
from data.shapes import PICTURE_KINDS, SIX_KINDS, TEXT_KINDS, sample, scores, unseen_question
from metaquery import InputError

AT_ONCE = 24  # pictures of others' benchmarks drawn together


def shapes(model, draw, args):
    """Draw and answer --limit unseen cases of each kind and score them; a table, and as JSON."""
    limit = args.limit or 50
    began, table, shown = time.time(), {}, []
    for kind in tqdm(TEXT_KINDS + PICTURE_KINDS * model.sees, "kinds"):
        made = [sample(kind, i, args.seed, "test") for i in range(limit)]
        drawn = draw(model, [(s.prompt, s.images) for s in made], args)
        table |= scores([(p, s) for row, s in zip(drawn, made, strict=True) for p in row])
        for s, row in list(zip(made, drawn, strict=True))[:10]:
            shown += [*s.images[:1], row[0]]
    if model.sees:
        asked = [unseen_question(i, args.seed) for i in tqdm(range(limit), "answers")]
        right = [model.answer(t.user, t.images) == t.assistant for t in asked]
        table["answers"] = sum(right) / len(right)
    table["six-kind overall"] = sum(table[kind] for kind in SIX_KINDS) / len(SIX_KINDS)
    for name, value in table.items():
        print(f"{name:>20}  {value:.3f}")
    cases = limit * args.num_images
    print(f"{cases} unseen cases a kind, seed {args.seed}, {args.steps} steps, "
          f"guidance {args.guidance:g}, image guidance {args.image_guidance:g}, "
          f"{time.time() - began:.0f} s")  # fmt: skip
    if args.json:
        names = ("seed", "steps", "guidance", "image_guidance")
        settings = {name: getattr(args, name) for name in names}
        written = {"scores": table, "pictures_per_kind": cases} | settings
        Path(args.json).write_text(json.dumps(written, indent=2) + "\n")
    if args.out:
        path = Path(args.out)
        path = path if path.suffix else path / "benchmark.png"
        grid(shown, 20).save(path)
        print(f"saved {path}")


@dataclass
class Item:
    """One prompt of a benchmark and the files that its pictures go to, below --out.

    `sheet` is a file for all of them in one 2x2 grid; `notes` are text files to write with them.
    """

    prompt: str
    files: list
    images: list = field(default_factory=list)
    negative: str = ""
    sheet: str = ""
    notes: dict = field(default_factory=dict)

    def written(self):
        """The files that must exist when the item is done."""
        return [*self.files, *[self.sheet] * bool(self.sheet)]


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
                yield Item(row[one], files, negative=row[other] if way == "negative" else "")


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


OFFICIAL = {f.__name__: f for f in (geneval, dpg, wise, commonsense, mjhq, coco, imagenet,
                                    dreambench)}  # fmt: skip


def keep(item, pictures, out):
    """Write an item's notes, pictures and sheet under `out`, each picture whole or not at all."""
    for name, text in item.notes.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    sheets = [(item.sheet, grid(pictures, 2, gap=0))] if item.sheet else []
    for name, picture in (*zip(item.files, pictures, strict=True), *sheets):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path.with_name(f".{path.name}"), "PNG")
        path.with_name(f".{path.name}").rename(path)


def official(model, draw, args):
    """Draw this process's share of a benchmark's prompts, all that are not there yet.

    Each prompt's noise is seeded by --seed and its place in the benchmark, however it is shared.
    """
    read, out = OFFICIAL[args.benchmark], Path(args.out)
    wanted = (
        f"{args.benchmark} wants {' '.join(read.__doc__.splitlines()[0].split(';')[0].split())}"
    )
    try:
        items = list(read(Path(args.data or ".")))[: args.limit]
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"cannot read --data {args.data} ({error}): {wanted}") from None
    if not items:
        raise InputError(f"--data {args.data} holds no prompts: {wanted}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = list(enumerate(items))[rank::world]
    todo = [row for row in mine if not all((out / name).exists() for name in row[1].written())]
    errors, bar = [], tqdm(total=len(todo), desc=args.benchmark)
    for alike, group in groupby(todo, lambda row: (len(row[1].files), row[1].negative)):
        (args.num_images, args.negative_prompt), group = alike, list(group)
        size = max(1, AT_ONCE // args.num_images)
        for start in range(0, len(group), size):
            rows, seeds, taken = [], [], []
            for place, item in group[start : start + size]:
                try:
                    rows.append((item.prompt, [open_picture(path) for path in item.images]))
                except ValueError as error:
                    errors.append(str(error))
                    continue
                seeds.append(args.seed + place)
                taken.append(item)
            for item, pictures in zip(taken, draw(model, rows, args, seeds), strict=True):
                keep(item, pictures, out)
            bar.update(min(size, len(group) - start))
    bar.close()
    print(f"saved {len(todo) - len(errors)} prompts in {out}; {len(mine) - len(todo)} were there")
    if errors:
        raise InputError(" ".join(errors))
