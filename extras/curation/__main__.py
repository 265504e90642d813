"""Make instruction data from web documents of images and captions (paper §4 and Appendix A).

    python -m extras.curation --data mmc4/ --out curated/
    torchrun --nproc-per-node=8 -m extras.curation --data mmc4/ --out curated/
    python train.py --stage instruct --data curated/ --checkpoint DIR --out DIR

--data is a shard of mmc4 (.jsonl, .jsonl.zip, .jsonl.gz) or a folder of them. Captions are grouped
by SigLIP; of each group the image least like the others is the target, and a multimodal LLM writes
the prompt that leads from the others to it.

Images are downloaded, or read from what img2dataset has saved, which is better for many:

    jq -r '.image_info[].raw_url' mmc4/*.jsonl > urls.txt
    img2dataset --url_list urls.txt --output_folder images --image_size 512 \\
        --resize_mode keep_ratio --resize_only_if_bigger True
    python -m extras.curation --data mmc4/ --images images/ --out curated/

--out gets train-*.parquet with the columns of MetaQuery-Instruct, stats.json, and sheet.jpg, which
shows some of the rows. The same command resumes a run that was stopped, at any point.
"""

import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import cli

BLOCK = 100  # documents that are saved together
CONNECTIONS = 32  # downloads at a time in each process
SHEET_ROWS = 16  # at most
CELL = 160  # pixels a side of its images
LINE = 20  # pixels of the height of a prompt


def parse_flags(argv=None):
    """The command's flags; stops with one line if they are wrong."""
    parser = cli.open_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="mmc4's shards: a file or a folder")
    add("--out", required=True, metavar="DIR", help="the folder of the instruction data")
    add("--images", metavar="DIR", help="img2dataset's folder; nothing is then downloaded")
    add("--siglip", default="google/siglip-so400m-patch14-384", help="hub id or folder")
    add("--mllm", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder, as for train.py")
    cosine, batch = cli.bounded(float, -1, 1), cli.bounded(int, 1, 10_000)
    add("--threshold", type=cosine, default=0.5, help="least cosine of a group's captions (0.5)")
    add("--batch-size", type=batch, default=8, help="prompts that the MLLM writes at once (8)")
    add("--device", default="", help="cpu, cuda, ... (cuda if there is one)")
    add("--dtype", default="", choices=cli.DTYPES, help="of the arithmetic (what is fast here)")
    args = parser.parse_args(argv)
    cli.check_writable(args.out, is_folder=True)
    return args


@contextmanager
def aside(path):
    """A path to write to, moved to `path` at the end: the file is there whole or not at all."""
    part = path.with_name(f".{os.environ.get('RANK', 0)}-{path.name}.part")
    yield part
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def check_settings(args, documents):
    """Note in --out what it is made from; exits if it was made otherwise."""
    names = ("data", "images", "siglip", "mllm", "threshold")
    settings = {name: getattr(args, name) for name in names} | {"documents": documents}
    path = Path(args.out) / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        fix = "give the flags that settings.json there has, or another --out"
        cli.fail(f"--out {args.out} was made from other data or with other flags: {fix}.")

    (path.parent / "blocks").mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(json.dumps(settings))


def as_jpeg(image):
    """A PIL image as `datasets` stores it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return {"bytes": file.getvalue(), "path": None}


def save_rows(rows, path):
    """Write rows, at least one, as parquet with the columns of MetaQuery-Instruct."""
    from datasets import Dataset, Image, List

    for row in rows:
        row["source_images"] = [as_jpeg(image) for image in row["source_images"]]
        row["target_image"] = as_jpeg(row["target_image"])
    table = Dataset.from_list(rows).cast_column("target_image", Image())
    table = table.cast_column("source_images", List(Image()))
    with aside(path) as part:
        table.to_parquet(part)


def curate_block(documents, encoder, writer, threshold):
    """(rows, counts) of a block's documents, (images, captions, counts) each.

    encoder: a `Siglip`, writer: an `InstructionWriter`, or what has their methods.
    """
    from extras.curation.instructions import group, make_row, read_answer

    rows, counts = [], Counter()
    for images, captions, found in documents:
        counts += found
        if len(images) < 2:
            continue
        for indices in group(encoder.captions(captions), threshold):
            counts[f"groups of {len(indices)}"] += 1
            group_images = [images[i] for i in indices]
            features = encoder.images(group_images)
            rows.append(make_row(group_images, [captions[i] for i in indices], features))

    rows.sort(key=lambda row: len(row["source_images"]))  # so that batches need little padding
    for row, answer in zip(rows, writer.write(rows), strict=True):
        row["prompt"] = read_answer(answer, row["target_caption"])
    kept = [row for row in rows if row["prompt"]]
    counts["rows"] = len(kept)
    return kept, counts


def curate(documents, get, encoder, writer, args):
    """Make --out, or what is missing of it; returns the counts of all blocks done.

    documents: as `open_documents` returns them. get: as for `read_document`. encoder, writer:
    as for `curate_block`. Each of torchrun's processes curates its share of the blocks.
    """
    from extras.curation.documents import read_document

    out = Path(args.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    blocks = range(rank * BLOCK, len(documents), world * BLOCK)
    to_do = [start for start in blocks if not (out / "blocks" / f"{start:09d}.json").exists()]

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for start in tqdm(to_do, "blocks", disable=rank > 0):
            lines = documents[start : start + BLOCK]["text"]
            read = pool.map(lambda line: read_document(line, get), lines)
            read = tqdm(read, "documents", len(lines), leave=False, disable=rank > 0)
            rows, counts = curate_block(read, encoder, writer, args.threshold)

            if rows:
                save_rows(rows, out / f"train-{start:09d}.parquet")
            with aside(out / "blocks" / f"{start:09d}.json") as part:  # the block is done
                part.write_text(json.dumps(counts))

    counts = Counter()
    for path in (out / "blocks").glob("*.json"):
        counts.update(json.loads(path.read_text()))
    (out / "stats.json").write_text(json.dumps(counts, indent=2) + "\n")
    if files := sorted(out.glob("train-*.parquet")):
        contact_sheet(files).save(out / "sheet.jpg")
    return counts


def contact_sheet(files):
    """Rows from all over some files as one image: sources, target, prompt."""
    import pyarrow.dataset
    from PIL import Image, ImageDraw, ImageOps

    table = pyarrow.dataset.dataset(files, format="parquet")
    step = table.count_rows() // SHEET_ROWS + 1
    rows = table.take(range(0, table.count_rows(), step)).to_pylist()
    sheet = Image.new("RGB", (6 * CELL, len(rows) * (CELL + LINE)), "white")
    pen = ImageDraw.Draw(sheet)

    for i, row in enumerate(rows):
        top = i * (CELL + LINE)
        images = [*row["source_images"], row["target_image"]]
        for j, image in enumerate(images):
            image = Image.open(io.BytesIO(image["bytes"]))
            sheet.paste(ImageOps.pad(image, (CELL, CELL), color="white"), (j * CELL, top))
        words = f"{len(images) - 1} to 1: {row['prompt']}"
        pen.text((4, top + CELL + 2), words, "black")
    return sheet


def main():
    args = parse_flags()
    with cli.errors_in_one_line():
        from datasets import disable_progress_bars

        from extras.curation.documents import download, open_documents, open_saved
        from extras.curation.instructions import InstructionWriter, Siglip

        disable_progress_bars()  # of writing each file
        documents, get = open_documents(args.data), download
        if args.images:
            get = open_saved(args.images)
        check_settings(args, len(documents))

        device = cli.device_of(args.device)
        dtype, _ = cli.choose_dtype(device, args.dtype)
        encoder = Siglip(args.siglip, device)
        writer = InstructionWriter(args.mllm, device, dtype, args.batch_size)
        counts = curate(documents, get, encoder, writer, args)
        print(f"{counts['rows']} rows are in {args.out}; stats.json counts what was dropped")


if __name__ == "__main__":
    main()
