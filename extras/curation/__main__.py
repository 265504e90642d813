"""Make instruction data from web documents of pictures and captions (paper §4 and Appendix A).

    python -m extras.curation --data mmc4/ --out curated/
    torchrun --nproc-per-node=8 -m extras.curation --data mmc4/ --out curated/
    python train.py --stage instruct --data curated/ --checkpoint DIR --out DIR

--data is an mmc4 shard (.jsonl, .jsonl.zip, .jsonl.gz), a folder of them, or a dataset (hub id,
folder or file) whose rows hold a list of pictures and a list of captions. Pictures are read from
disk or downloaded; captions grouped by SigLIP; of each group the picture least like the others is
the target, and a multimodal LLM writes the prompt that leads from the others to it.

--out gets train-*.parquet with the columns of MetaQuery-Instruct, stats.json, and sheet.html, which
shows random rows. The same command resumes a run that was stopped, at any point.
"""

import argparse
import base64
import fcntl
import html
import io
import json
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from cli import (
    DTYPES,
    check_writable,
    choose_dtype,
    device_of,
    errors_in_one_line,
    fail,
    set_up,
)

STAGES = ("read", "captions", "groups", "pictures", "targets", "instructions", "save")
BOUNDS = {
    "threshold": (-1, 1),
    "min_size": (1, 10_000),
    "resolution": (16, 10_000),
    "batch_size": (1, 100_000),
    "mllm_batch_size": (1, 10_000),
    "block_size": (1, 10**6),
    "connections": (1, 1000),
    "timeout": (0.1, 3600),
    "max_megabytes": (1, 1000),
    "retries": (0, 20),
    "pause": (0, 60),
}
# What all rows of a folder have in common.
SETTINGS = ("data", "images", "siglip", "mllm", "threshold", "min_size", "resolution", "block_size")
SHEET_ROWS = 24
SHEET_SIDE = 160  # pixels of its pictures' long sides


def parse_flags(argv=None):
    """The command's flags; stops with one line if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="extras.curation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    set_up(parser)
    add = parser.add_argument
    add("--data", required=True, help="mmc4 shards, or a dataset: see above")
    add("--out", required=True, metavar="DIR", help="the folder of the instruction data")
    add("--images", default="", metavar="DIR", help="mmc4's pictures on disk (--data's folder)")
    add("--images-column", default="", help="a dataset's column of pictures or addresses (images)")
    add("--captions-column", default="", help="its column of captions (captions)")
    add("--siglip", default="google/siglip-so400m-patch14-384", help="hub id or folder")
    add("--mllm", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder, as for train.py")
    add("--threshold", type=float, default=0.5, help="least cosine of captions in a group (0.5)")
    add("--min-size", type=int, default=256, help="least pixels of a picture's short side (256)")
    add(
        "--resolution", type=int, default=512, help="most pixels of a short side that is kept (512)"
    )

    add("--batch-size", type=int, default=64, help="captions or pictures for SigLIP at once (64)")
    add("--mllm-batch-size", type=int, default=8, help="prompts for the MLLM at once (8)")
    add("--block-size", type=int, default=200, help="documents that are saved together (200)")
    add("--connections", type=int, default=32, help="downloads at a time in each process (32)")
    add("--timeout", type=float, default=20, help="seconds for one request (20)")
    add("--max-megabytes", type=int, default=20, help="most megabytes of a picture file (20)")
    add("--retries", type=int, default=2, help="further tries of a failed download (2)")
    add("--pause", type=float, default=0.1, help="seconds between two requests to a host (0.1)")
    private = "also download from private and loopback addresses: a server of your own"
    add("--allow-private-addresses", action="store_true", help=private)
    add("--device", default="", help="cpu, cuda, ... (cuda if there is one)")
    add("--dtype", default="", choices=DTYPES, help="of the arithmetic (what is fast here)")
    args = parser.parse_args(argv)
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if not least <= value <= most:
            fail(f"--{name.replace('_', '-')} is {value}: give {least:g} to {most:g}.")
    out = check_writable(args.out, is_folder=True)
    if out.exists() and any(out.iterdir()) and not (out / "curate.json").exists():
        fail(f"--out {out} holds files that no run of this command wrote: name another --out.")
    return args


# ---- 1. Files ------------------------------------------------------------------------------------


@contextmanager
def aside(path):
    """A path to write to, moved to `path` at the end: the file is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(out):
    """One process at a time, of all that write to the folder."""
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_settings(args):
    """Note in --out what it is made from; raises InputError if it was made otherwise."""
    from metaquery import InputError

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "blocks").mkdir(exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    with locked(out):
        path = out / "curate.json"
        if path.exists():
            for name, value in json.loads(path.read_text()).items():
                if value != settings.get(name, value):
                    flag = name.replace("_", "-")
                    made = f"--out {out} was made with --{flag} {value}, not {settings[name]}"
                    raise InputError(f"{made}: give the same, or another --out.")
            return
        with aside(path) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")


def as_jpeg(picture):
    """A PIL image as `datasets` stores it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return {"bytes": file.getvalue(), "path": None}


def save_rows(rows, path):
    """Write [(`ImagePair`, prompt)] as parquet with the columns of MetaQuery-Instruct."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {
            "source_images": List(Image()),
            "source_captions": List(Value("string")),
            "prompt": Value("string"),
            "target_image": Image(),
            "target_caption": Value("string"),
        }
    )
    columns = {
        "source_images": [[as_jpeg(picture) for picture in p.source_images] for p, _ in rows],
        "source_captions": [pair.source_captions for pair, _ in rows],
        "prompt": [prompt for _, prompt in rows],
        "target_image": [as_jpeg(pair.target_image) for pair, _ in rows],
        "target_caption": [pair.target_caption for pair, _ in rows],
    }
    if not rows:  # of an earlier try of the same block, which was killed before it was done
        path.unlink(missing_ok=True)
        return
    with aside(path) as part:
        Dataset.from_dict(columns, features=features).to_parquet(part)


# ---- 2. A block of documents ---------------------------------------------------------------------


class Clock:
    """Seconds spent in each stage."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage):
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def curate_block(block, args, encoder, writer):
    """Curate a block and save its rows, then its statistics, which mark it as done.

    encoder: a `Siglip`, writer: an `InstructionWriter`, or what has their methods.
    """
    from extras.curation.documents import read_documents
    from extras.curation.instructions import choose_target, fault, group, make_pair, read_answer

    clock, out = Clock(), Path(args.out)
    with clock("read"):
        documents, counts, dropped = read_documents(block, args)
    with clock("captions"):
        captions = [caption for document in documents for caption in document.captions]
        features = encoder.captions(captions)
    grouped, start = [], 0  # (document, indices of its pictures)
    with clock("groups"):
        for document in documents:
            stop_at = start + len(document.captions)
            groups = group(features[start:stop_at], args.threshold)
            grouped += [(document, indices) for indices in groups]
            dropped["like no other"] = dropped.get("like no other", 0) + (stop_at - start)
            dropped["like no other"] -= sum(map(len, groups))
            start = stop_at
    with clock("pictures"):
        pictures = [document.pictures[i] for document, indices in grouped for i in indices]
        features = encoder.pictures(pictures)
    pairs, start = [], 0
    with clock("targets"):
        for document, indices in grouped:
            target = choose_target(features[start : start + len(indices)])
            start += len(indices)
            group_pictures = [document.pictures[i] for i in indices]
            group_captions = [document.captions[i] for i in indices]
            pairs.append(make_pair(group_pictures, group_captions, target))
    with clock("instructions"):
        prompts = [read_answer(answer) for answer in writer.write(pairs)]
        faults = [fault(p, pair.target_caption) for p, pair in zip(prompts, pairs, strict=True)]
    with clock("save"):
        written = zip(pairs, prompts, faults, strict=True)
        rows = [(pair, prompt) for pair, prompt, wrong in written if wrong is None]
        save_rows(rows, out / f"train-{block.name}.parquet")
    stats = counts | {
        "dropped_pictures": dropped,
        "groups_by_size": Counter(str(len(indices)) for _, indices in grouped),
        "instructions": Counter(wrong or "kept" for wrong in faults),
        "seconds": clock.seconds,
    }
    with aside(out / "blocks" / f"{block.name}.json") as part:
        part.write_text(json.dumps(stats))


def open_run(args):
    """All blocks of args.data, and args.out made ready for them.

    Raises InputError if there is nothing to read, or --out was made with other settings.
    """
    from extras.curation.documents import open_blocks

    columns = {"images": args.images_column, "captions": args.captions_column}
    blocks = open_blocks(args.data, args.block_size, columns)
    check_settings(args)
    return blocks


def to_do(blocks, args):
    """The blocks of this process's share that are not done yet."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    done = {path.stem for path in (Path(args.out) / "blocks").glob("*.json")}
    return [block for block in blocks[rank::world] if block.name not in done]


def curate(blocks, args, encoder, writer):
    """Curate this process's share of an `open_run`'s blocks; returns the folder's statistics."""
    from datasets import disable_progress_bars

    disable_progress_bars()  # of writing each file
    out, rest = Path(args.out), to_do(blocks, args)
    others_bar = int(os.environ.get("RANK", 0)) > 0
    documents = sum(block.count for block in rest)
    with tqdm(total=documents, unit="doc", disable=others_bar, mininterval=2) as bar:
        for block in rest:
            curate_block(block, args, encoder, writer)
            bar.update(block.count)
    with locked(out):
        stats = sum_up(out)
    if stats["blocks"] == len(blocks):  # the last process to finish has seen all
        print(f"kept {stats.get('instructions', {}).get('kept', 0)} instructions: {out}")
    return stats


# ---- 3. Statistics and contact sheet -------------------------------------------------------------


def add_up(total, part):
    """Add a nested dict of numbers to another."""
    for name, value in part.items():
        if isinstance(value, dict):
            add_up(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def sum_up(out):
    """Write stats.json and sheet.html of all blocks that are done; returns the statistics."""
    stats = {"blocks": 0}
    for path in sorted((out / "blocks").glob("*.json")):
        add_up(stats, {"blocks": 1} | json.loads(path.read_text()))
    seconds, documents = stats.pop("seconds", {}), stats.get("documents", 0)
    total = sum(seconds.values()) or 1.0

    stats["stages"] = {
        name: {
            "seconds": round(spent, 3),
            "share": round(spent / total, 4),
            "documents_per_second": round(documents / spent, 2) if spent else None,
        }
        for name, spent in seconds.items()
    }
    stats["documents_per_second"] = round(documents / total, 3)  # of one process
    with aside(out / "stats.json") as part:
        part.write_text(json.dumps(stats, indent=2) + "\n")
    with aside(out / "sheet.html") as part:
        part.write_text(contact_sheet(random_rows(out)), encoding="utf-8")
    return stats


def random_rows(out):
    """SHEET_ROWS rows of a folder, the same each time: a list of dicts."""
    import pyarrow.parquet

    files = sorted(out.glob("train-*.parquet"))
    places = [
        (file, row) for file in files for row in range(pyarrow.parquet.read_metadata(file).num_rows)
    ]
    chosen = random.Random(0).sample(places, min(SHEET_ROWS, len(places)))
    return [pyarrow.parquet.read_table(file).slice(row, 1).to_pylist()[0] for file, row in chosen]


def contact_sheet(rows):
    """Rows as a page to look at: sources, prompt, target."""
    from PIL import Image

    def figure(stored, caption):
        picture = Image.open(io.BytesIO(stored["bytes"]))
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
        data = base64.b64encode(as_jpeg(picture)["bytes"]).decode()
        words = html.escape(caption if len(caption) <= 120 else caption[:119] + "…")
        return f'<figure><img src="data:image/jpeg;base64,{data}"><figcaption>{words}</figcaption>'

    style = (
        "body{font:14px sans-serif;margin:2em}section{display:flex;align-items:center;gap:1em;"
        f"border-bottom:1px solid #ccc;padding:.5em}}figure{{margin:0;width:{SHEET_SIDE}px}}"
        "img{outline:1px solid #ccc}"
        "figcaption{font-size:11px;color:#666;overflow-wrap:anywhere}p{width:18em;font-weight:600}"
    )
    page = [
        f'<!doctype html><meta charset="utf-8"><title>Curated rows</title><style>{style}</style>'
    ]
    page.append(f"<h1>{len(rows)} random rows: sources, prompt, target</h1>")
    for row in rows:
        sources = zip(row["source_images"], row["source_captions"], strict=True)
        figures = "".join(figure(*source) + "</figure>" for source in sources)
        target = figure(row["target_image"], row["target_caption"]) + "</figure>"
        page.append(f"<section>{figures}<p>→ {html.escape(row['prompt'])} →</p>{target}</section>")
    return "\n".join(page) + "\n"


def main():
    args = parse_flags()
    with errors_in_one_line():
        from transformers.utils.logging import disable_progress_bar

        from extras.curation.instructions import InstructionWriter, Siglip

        disable_progress_bar()
        blocks, encoder, writer = open_run(args), None, None
        if to_do(blocks, args):
            device = device_of(args.device)
            dtype, _ = choose_dtype(device, args.dtype)
            encoder = Siglip(args.siglip, device, args.batch_size)
            writer = InstructionWriter(args.mllm, device, dtype, args.mllm_batch_size)
        curate(blocks, args, encoder, writer)


if __name__ == "__main__":
    main()
