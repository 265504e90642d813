"""FID, PSNR, SSIM and LPIPS of drawn pictures, measured as the paper's authors did.

    pip install torchmetrics torch-fidelity
    python -m benchmarks.scores OUT REFERENCE

OUT is a folder of drawings. REFERENCE is a folder of pictures, or of parquet files with a column
"image". On both sides the short side becomes 256 pixels (bicubic, antialiased) and the middle 256
by 256 are kept. PSNR, SSIM and LPIPS compare pictures of the same name, and are printed if every
drawing has one. FID and LPIPS download the weights of their networks.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cli import begin, check_bounds, errors_in_one_line, stop
from sample import SUFFIXES, open_picture
from metaquery import InputError, to_rgb

SIDE = 256


def pictures_in(folder):
    """{name without suffix: function that opens the picture} of a folder; sorted by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    if files:
        names = [str(path.relative_to(folder).with_suffix("")) for path in files]
        openers = [partial(open_picture, path) for path in files]
        return dict(zip(names, openers, strict=True))
    tables = [str(path) for path in sorted(folder.rglob("*.parquet"))]
    if not tables:
        raise InputError(f"{folder} holds no pictures and no parquet files: name another folder.")
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=tables, split="train")
    return {f"{i:05d}": (lambda i=i: rows[i]["image"]) for i in range(len(rows))}


def to_square(picture):
    """A PIL picture as (3, 256, 256) uint8: short side resized, centre cropped."""
    from torchvision.transforms.v2 import (
        CenterCrop,
        Compose,
        InterpolationMode,
        PILToTensor,
        Resize,
    )

    resize = Resize(SIDE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return Compose([resize, CenterCrop(SIDE), PILToTensor()])(to_rgb(picture))


def batches(pictures, names, size, label):
    """Batches (B, 3, 256, 256) uint8 of the named pictures."""
    for start in tqdm(range(0, len(names), size), label):
        yield torch.stack([to_square(pictures[name]()) for name in names[start : start + size]])


def paired_scores(drawn, reference, size, device):
    """{name: figure} of PSNR, SSIM and, if its weights are there, LPIPS, for pictures in [0, 1]."""
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metrics = {"PSNR in dB": PeakSignalNoiseRatio(data_range=1.0)}
    metrics["SSIM"] = StructuralSimilarityIndexMeasure(data_range=1.0)
    try:
        metrics["LPIPS"] = LearnedPerceptualImagePatchSimilarity(normalize=True)
    except Exception as error:
        print(f"LPIPS is left out: its network cannot be loaded ({str(error).splitlines()[0]})")
    names = list(drawn)
    both = (batches(pictures, names, size, "pairs") for pictures in (drawn, reference))
    for ours, theirs in zip(*both, strict=True):
        for metric in metrics.values():
            metric.to(device).update(ours.to(device) / 255, theirs.to(device) / 255)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def frechet_distance(drawn, reference, size, device):
    """FID of two sets of pictures; raises InputError if its network's weights are not there."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance().to(device)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"FID's network cannot be loaded ({reason}): go online once.") from None
    for pictures, real in ((reference, True), (drawn, False)):
        for batch in batches(pictures, list(pictures), size, "reference" if real else "drawn"):
            metric.update(batch.to(device), real=real)
    return metric.compute().item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    parser.add_argument("drawn", type=Path, metavar="OUT")
    parser.add_argument("reference", type=Path, metavar="REFERENCE")
    parser.add_argument("--batch-size", type=int, default=50, help="pictures at a time (50)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_bounds(vars(args), {"batch_size": (1, 10_000)})
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        stop("torchmetrics is not installed: pip install torchmetrics torch-fidelity.")
    with errors_in_one_line():
        drawn, reference = pictures_in(args.drawn), pictures_in(args.reference)
        print(f"{len(drawn)} drawings, {len(reference)} reference pictures")
        if drawn.keys() <= reference.keys():
            scores = paired_scores(drawn, reference, args.batch_size, args.device)
            for name, value in scores.items():
                print(f"{name:>12}  {value:.4f}", flush=True)
        fid = frechet_distance(drawn, reference, args.batch_size, args.device)
        print(f"{'FID':>12}  {fid:.4f}")


if __name__ == "__main__":
    main()
