"""Make the toy world's frozen, "pre-trained" parts, each as its real counterpart was made.

    python -m extras.toy_parts --out weights/new        every part that is not there yet, in order

vae        a toy DC-AE (Sana's autoencoder), trained to redraw random scenes
vision     a toy SigLIP tower, taught what each patch shows; it is the MLLM's eye
llm        a toy Qwen2, trained to talk: of facts, of prompts, of images given to it as words
mllm       LLaVA-OneVision of the two: its eye learns those words, then it talks of real images
diffusion  a toy Sana, conditioned on the last-layer embeddings of `llm`, as Sana is on Gemma's

Each part is saved in the hub's own layout, so that `from_pretrained(folder)` loads it like the
real one; vision/ and llm/ are steps on the way. It takes hours: on one core the language model
alone takes about two. Stopped at any time, the same command resumes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cli import bounded, check_writable, device_of, errors_in_one_line, fail, open_parser
from extras.toy_parts.diffusion import train_diffusion, train_vae
from extras.toy_parts.fit import Run
from extras.toy_parts.language import train_llm, train_mllm
from extras.toy_parts.vision import train_vision


class Part(NamedTuple):
    """One of the frozen parts: how it is made, and from which others."""

    make: Callable
    steps: int
    batch_size: int
    file: str  # below --out; it is there once the part is made
    needs: tuple = ()


PARTS = {
    "vae": Part(train_vae, 5500, 32, "diffusion/vae/config.json"),
    "vision": Part(train_vision, 3000, 64, "vision/config.json"),
    "llm": Part(train_llm, 5000, 32, "llm/config.json"),
    "mllm": Part(train_mllm, 100, 32, "mllm/config.json", ("vision", "llm")),
    "diffusion": Part(
        train_diffusion, 8000, 32, "diffusion/transformer/config.json", ("vae", "llm")
    ),
}


def parse_arguments():
    parser = open_parser(__doc__)
    number = bounded(int, 1, 10**6)
    add = parser.add_argument
    add("--out", default="weights/new", help="the parts' folder (weights/new)")
    add("--part", choices=list(PARTS), help="make this part only, again if it is there")
    add("--start", default="", help="train this MLLM, a folder, further: with --part mllm")
    add("--steps", type=number, help="training steps of --part")
    add("--batch-size", type=number, help="samples or conversations a step of --part")
    add("--threads", type=number, default=torch.get_num_threads(), help="of the CPU (all)")
    add("--device", default="", help="cpu or cuda (the best there is)")
    add("--workers", type=bounded(int, 0, 1000), help="prepare batches (on a GPU one a core)")
    args = parser.parse_args()

    args.out = check_writable(args.out, is_folder=True)
    args.device = device_of(args.device).type
    if args.workers is None:
        args.workers = os.cpu_count() * (args.device == "cuda")
    if (args.steps or args.batch_size) and not args.part:
        fail("--steps and --batch-size are of one part: give --part too.")
    if args.start and (args.part != "mllm" or not Path(args.start, "config.json").exists()):
        fail(f"--start {args.start} is for an MLLM's folder: give it with --part mllm.")
    if args.part and not args.start:
        for name in PARTS[args.part].needs:
            if not (args.out / PARTS[name].file).exists():
                need = f"--part {args.part} needs {name} in {args.out}"
                fail(f"{need}: make --part {name} first.")
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with errors_in_one_line():
        for name, part in PARTS.items():
            is_missing = not (args.out / part.file).exists()
            if args.part == name or (args.part is None and is_missing):
                args.out.mkdir(parents=True, exist_ok=True)
                steps = args.steps or part.steps
                batch_size = args.batch_size or part.batch_size
                run = Run(args.out, steps, batch_size, args.device, args.workers, args.start)
                part.make(run)


if __name__ == "__main__":
    main()
