"""How many flags a linear map could name: an estimate of what the arms of `flags` could draw.

    python -m benchmarks.flag_readout             all arms, three seeds
    python -m benchmarks.flag_readout --seeds 1   one training of each

The arms are those of `python -m benchmarks.tables flags`, with the same frozen language model,
queries, connector and prompts. Only the end differs: instead of a diffusion model, a linear map
reads the country from the mean of the condition, and all is trained by cross-entropy. What it names
and an arm does not draw is lost in the drawing. It is trained briefly, so an arm may read more.
Writes benchmarks/results/flag_readout.json and .png.
"""

import argparse
import json
import random

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import get_cosine_schedule_with_warmup

from benchmarks.arms import IN_WORK
from benchmarks.measures import print_table, save_figure, summary
from benchmarks.real_knowledge import MEASURES, choose_questions, make_flags, mean_conditions
from benchmarks.tables import TABLES
from data.command_line import begin, check_bounds, errors_in_one_line, writable
from data.flags import code_of, flags, questions
from metaquery import MetaQuery, MetaQueryConfig
from training.kernels import choose_attention
from training.prompts import CachedPrompts

BOUNDS = {name: (1, 10**6) for name in ("seeds", "steps", "batch_size", "limit")}
LR, WARMUP = 1e-3, 30  # the highest learning rate, and the steps to reach it


class Readout:
    """A model and a linear map `head` from its mean condition to F countries."""

    def __init__(self, config, codes):
        self.model = MetaQuery(config, torch.bfloat16)
        choose_attention(self.model)
        self.model.mllm.base_model.forward = CachedPrompts(self.model)
        self.head = torch.nn.Linear(self.model.connector.norm.weight.numel(), len(codes))
        self.codes = codes

    def logits(self, rows):
        """The logits (B, F) of B questions."""
        return self.head(mean_conditions(self.model, rows))

    def train(self, rows, args, seed):
        """Train the queries, the connector and the head to name the country of each question."""
        trained = [self.model.queries, *self.model.connector.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(trained, LR, (0.9, 0.95))
        schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, args.steps)
        rng = random.Random(seed)
        for _ in trange(args.steps, desc="training", leave=False):
            some = rng.choices(rows, k=args.batch_size)
            labels = torch.tensor([self.codes.index(code_of(row)) for row in some])  # (B,)
            F.cross_entropy(self.logits(some), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def measure(self, folder, name, args):
        """{name: share named right, and among the five most likely}, as `measure_flags` does."""
        rows = choose_questions(folder, name, args.limit)
        parts = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
        order = torch.cat([self.logits(part) for part in parts]).argsort(1, descending=True)
        labels = torch.tensor([self.codes.index(code_of(row)) for row in rows])
        is_right = order == labels[:, None]  # (B, F)
        top_1, top_5 = (is_right[:, :n].any(1).float().mean().item() for n in (1, 5))
        return {name: top_1, f"{name}, top 5": top_5}


def read_out(arm, seed, args):
    """Train one read-out and measure it: {measure: {name: share}}."""
    folder = args.work / "flags"
    config = {n: str(args.work / x) if n in IN_WORK else x for n, x in arm.config.items()}
    torch.manual_seed(seed)
    readout = Readout(MetaQueryConfig.preset("tiny", **config), list(flags(folder)))
    readout.train(questions(folder, "trained"), args, seed)
    return {name: readout.measure(folder, name, args) for name in MEASURES}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="trainings of each arm (3)")
    add("--steps", type=int, default=200, help="of each training (200)")
    add("--batch-size", type=int, default=32, help="prompts a step (32)")
    add("--limit", type=int, default=80, help="how many questions of each sort (80)")
    add("--work", default="runs/tables", help="the folder with flags/ (runs/tables)")
    add("--out", default="benchmarks/results", help="where flag_readout.json and .png are written")
    args = parser.parse_args()
    check_bounds(vars(args), BOUNDS)
    args.work, out = writable(args.work, True).resolve(), writable(args.out, True)
    table, seeds = TABLES["flags"], list(range(args.seeds))
    with errors_in_one_line():
        make_flags(args.work / "flags")
        settings = {name: getattr(args, name) for name in ("steps", "batch_size", "limit")}
        result = {"table": "flag_readout", "seeds": seeds, "settings": settings | {"lr": LR}}
        result["arms"] = {}
        for name, arm in table.arms.items():
            measured = [read_out(arm, seed, args) for seed in seeds]
            result["arms"][name] = {"config": arm.config} | summary(measured)
            out.mkdir(parents=True, exist_ok=True)
            (out / "flag_readout.json").write_text(json.dumps(result, indent=2) + "\n")
        print_table(result)
        save_figure(result, out / "flag_readout.png")


if __name__ == "__main__":
    main()
