"""FID, PSNR, SSIM and LPIPS of generated images, measured as the paper's authors did.

    pip install torchmetrics torch-fidelity
    python -m benchmarks.scores OUT REFERENCE

OUT is a folder of generated images. REFERENCE is a folder of images, or of parquet files with a
column "image". On both sides the short side becomes 256 pixels (bicubic, antialiased) and the
middle 256 by 256 are kept. PSNR, SSIM and LPIPS compare images of the same name, and are printed
if every generated one has one. FID and LPIPS download the weights of their networks. Images that
cannot be read are named and left out.
"""

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torchvision.transforms import v2
from tqdm import tqdm

import cli
from benchmarks import data_files
from metaquery import InputError, to_rgb
from sample import SUFFIXES, open_image

SIDE = 256


def images_in(folder):
    """{name without suffix: function that opens the image} of a folder; sorted by name."""
    files = data_files(folder, SUFFIXES)
    if files:
        names = [str(path.relative_to(folder).with_suffix("")) for path in files]
        openers = [partial(open_image, path) for path in files]
        return dict(zip(names, openers, strict=True))

    tables = [str(path) for path in data_files(folder, {".parquet"})]
    if not tables:
        raise InputError(f"{folder} holds no images and no parquet files: name another folder.")
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=tables, split="train").select_columns(["image"])
    return {f"{i:05d}": (lambda i=i: rows[i]["image"]) for i in range(len(rows))}


def to_square(image):
    """A PIL image as (3, 256, 256) uint8: short side resized, centre cropped."""
    resize = v2.Resize(SIDE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(SIDE), v2.PILToTensor()])(to_rgb(image))


def batches(folders, size, label):
    """Batches (B, 3, 256, 256) uint8 of the images with the first folder's names: a list of one
    for each folder. folders: as `images_in` gives them; names that cannot be read in any of them
    are removed from all, and printed."""
    names = list(folders[0])
    for start in tqdm(range(0, len(names), size), label):
        rows = []
        for name in names[start : start + size]:
            try:
                rows.append([to_square(images[name]()) for images in folders])
            except Exception as error:  # each format raises its own
                print(f"left out {name}: {' '.join(str(error).split())}", file=sys.stderr)
                for images in folders:
                    images.pop(name)
        if rows:
            yield [torch.stack(images) for images in zip(*rows, strict=True)]


def paired_scores(generated, reference, size, device):
    """{metric: value} of PSNR, SSIM and, if its weights are there, LPIPS, of images in [0, 1]."""
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metrics = {"PSNR in dB": PeakSignalNoiseRatio(data_range=1.0)}
    metrics["SSIM"] = StructuralSimilarityIndexMeasure(data_range=1.0)
    try:
        metrics["LPIPS"] = LearnedPerceptualImagePatchSimilarity(normalize=True)
    except Exception as error:  # no network, or no torchvision weights
        print(f"LPIPS is left out: its network cannot be loaded ({str(error).splitlines()[0]})")

    for ours, theirs in batches([generated, reference], size, "pairs"):
        for metric in metrics.values():
            metric.to(device).update(ours.to(device) / 255, theirs.to(device) / 255)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def frechet_distance(generated, reference, size, device):
    """FID of two sets of images; raises InputError if its network's weights are not there."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance().to(device)
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"FID's network cannot be loaded ({reason}): go online once.") from None

    for (batch,) in batches([reference], size, "reference"):
        metric.update(batch.to(device), real=True)
    for (batch,) in batches([generated], size, "generated"):
        metric.update(batch.to(device), real=False)
    return metric.compute().item()


def main():
    parser = cli.open_parser(__doc__)
    add = parser.add_argument
    add("generated", type=Path, metavar="OUT")
    add("reference", type=Path, metavar="REFERENCE")
    add("--batch-size", type=cli.bounded(int, 1, 10_000), default=50, help="at a time (50)")
    add("--device", default="", help="cpu, cuda, ... (the best there is)")
    args = parser.parse_args()
    if not find_spec("torchmetrics"):
        cli.fail("torchmetrics is not installed: pip install torchmetrics torch-fidelity.")

    device = cli.device_of(args.device)
    with cli.errors_in_one_line():
        generated, reference = images_in(args.generated), images_in(args.reference)
        print(f"{len(generated)} generated images, {len(reference)} reference images")
        if generated.keys() <= reference.keys():
            scores = paired_scores(dict(generated), dict(reference), args.batch_size, device)
            for name, value in scores.items():
                print(f"{name:>12}  {value:.4f}", flush=True)
        fid = frechet_distance(generated, reference, args.batch_size, device)
        print(f"{'FID':>12}  {fid:.4f}")


if __name__ == "__main__":
    main()
