"""Parts of random weights at the paper's sizes, and images to train on: without any download.

    python -m extras.random_parts base --out runs/random
    python train.py --size base --mllm runs/random/mllm --diffusion runs/random/diffusion \\
      --data runs/random/images --steps 60 --batch-size 128 --out runs/base

What is measured so is a run's time and memory, not what it learns. The folders have the hub's
layout. The tokenizer is the toy's, so captions are short; the images are 512 pixels a side.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from cli import bounded, check_writable, device_of, errors_in_one_line, open_parser
from extras.architectures import build
from metaquery import PRESETS, TINY, MetaQueryConfig
from toy.tasks import task

SHARD = 500  # images in a tar


def write_parts(config, out, device):
    """Write mllm/ and diffusion/ of a config, of random weights in bfloat16."""
    with device:
        model = build(config, torch.bfloat16).bfloat16()
    model.mllm.save_pretrained(out / "mllm")
    processor_class = AutoTokenizer
    if model.format.takes_images:
        processor_class = AutoProcessor
    processor_class.from_pretrained(TINY / "mllm").save_pretrained(out / "mllm")

    part = "unet"
    if "caption_channels" in model.diffusion.config:  # Sana
        part = "transformer"
    model.diffusion.save_pretrained(out / "diffusion" / part)
    model.vae.save_pretrained(out / "diffusion" / "vae")
    model.scheduler.save_pretrained(out / "diffusion" / "scheduler")


def write_images(count, out):
    """Write so many random images with captions, as cc12m-wds has them: tars of jpg and txt."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for first in range(0, count, SHARD):
        with tarfile.open(out / f"{first // SHARD:05d}.tar", "w") as tar:
            for i in range(first, min(first + SHARD, count)):
                small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
                jpg = io.BytesIO()
                small.resize((512, 512), Image.Resampling.BICUBIC).save(jpg, "JPEG")
                text = task("position", i).prompt.encode()
                for suffix, data in (("jpg", jpg.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def main():
    parser = open_parser(__doc__)
    add = parser.add_argument
    add("size", choices=list(PRESETS), help="whose parts")
    add("--out", default="runs/random", help="their folder (runs/random)")
    add("--images", type=bounded(int, 1, 10**7), default=4000, help="how many (4,000)")
    args = parser.parse_args()

    out = Path(check_writable(args.out, is_folder=True))
    torch.manual_seed(0)
    with errors_in_one_line():
        write_parts(MetaQueryConfig.preset(args.size), out, device_of())
        write_images(args.images, out / "images")
        print(f"saved {out}")


if __name__ == "__main__":
    main()
