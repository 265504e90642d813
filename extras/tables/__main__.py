"""The paper's tables, small: arms trained alike on the toy world, scored exactly, with error bars.

    python -m extras.tables knowledge       train, score and draw one table, three seeds an arm
    python -m extras.tables T1 --seeds 5    more seeds; what is there already is kept

An arm is some fields of MetaQueryConfig and the stages it is trained in. train.py trains all arms
from the same frozen parts, on the same data and for as many steps; an arm that several tables name
is trained once. Stopped at any time, the same command resumes: models are kept in --work, and what
was measured of each in benchmarks/results/arms, so that another machine can go on without the
models. Two files are written, benchmarks/results/NAME.png and NAME.json:

    {"table": "knowledge", "claim": ..., "seeds": [0, 1, 2], "settings": {"steps": 900, ...},
     "made on": [{"device": "cpu", "torch": ..., ...}],
     "arms": {"queries": {"config": {"num_queries": 16}, "stages": ["pretrain"],
                          "figures": {"knowledge": [0.71, 0.69, 0.74], ...},
                          "mean": {"knowledge": 0.713, ...}, "spread": {"knowledge": 0.025, ...}},
              "last layer": ...}}

Figures have one value a seed, which is the seed of weights, training data and test cases. All are
shares of right pictures or answers, but for "PSNR in dB", "training loss", "samples per second"
and "saved parameters". The spread is the standard deviation over seeds (of a sample: n - 1).
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import frozen, real_knowledge
from extras.tables.variants import Arm, folder_of, read_scores, score_arm, train
from extras.tables.frozen import frozen_digest
from extras.tables.metrics import DRAWING, print_table, save_figure, summary
from cli import begin, check_bounds, errors_in_one_line, writable
from toy.tasks import SIX_KINDS

BOUNDS = {name: (1, 10**6) for name in ("seeds", "steps", "batch_size", "limit", "jobs")}
BOUNDS["lr"] = (1e-6, 1.0)

# ---- The tables ----------------------------------------------------------------------------------


class Table(NamedTuple):
    """What the paper claims, the arms that check it, and what is measured of each."""

    claim: str
    arms: dict
    measures: tuple  # see benchmarks/measures.py


INSTRUCT = ("pretrain", "instruct")
CAPTIONS = (*SIX_KINDS, "dense")
SUBJECTS = ("one subject", "two subjects")
QUERIES = Arm({"num_queries": 16})  # as in the preset
LAST_LAYER = Arm({"condition_on": "last_layer"})
FLAGS = {"mllm": "flags/smollm2", "diffusion": "flags/diffusion"}
FLAGS |= {"num_queries": 2, "connector_layers": 2}
# Which flag it is shows at high noise levels: more of them make it learn sooner.
FLAG_RUN = {"data": "flags/train", "cache_prompts": True, "sigma_shift": 3.0}
FLAG_QUERIES = Arm(FLAGS, run=FLAG_RUN)
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
TABLES = {
    "knowledge": Table(  # Tables 6, 7 and 9
        "queries carry the MLLM's knowledge to the picture, its last layer does so less",
        {"queries": QUERIES, "last layer": LAST_LAYER},
        (*CAPTIONS, "knowledge", "commonsense", "commonsense, negative prompt"),
    ),
    "T1": Table(
        "queries draw as well as the last layer, more of them better; random ones do not",
        {"last layer": LAST_LAYER, "random": Arm({"condition_on": "random"})}
        | {f"N = {n}": Arm({"num_queries": n}) for n in (4, 16, 64)},
        CAPTIONS,
    ),
    "T2": Table(
        "frozen, an MLLM serves as well as tuned, and still answers; tuning the diffusion helps",
        {
            "both frozen": Arm({"train_diffusion": False}),
            "diffusion tuned": QUERIES,
            "MLLM tuned": Arm({"train_mllm": True, "train_diffusion": False}),
            "both tuned": Arm({"train_mllm": True}),
        },
        (*CAPTIONS, "answers"),
    ),
    "T3": Table(
        "the connector enc-proj draws better than proj-enc, with fewer parameters",
        {
            f"{design}, {layers}": Arm({"connector": design, "connector_layers": layers})
            for design in ("enc-proj", "proj-enc")
            for layers in (1, 3, 6)
        },
        CAPTIONS,
    ),
    "F2": Table(
        "more queries draw captions better, dense ones most of all",
        {f"N = {n}": Arm({"num_queries": n}) for n in NUMBERS},
        CAPTIONS,
    ),
    "F2-reconstruction": Table(
        "more queries reconstruct pictures better",
        {f"N = {n}": Arm({"num_queries": n}, ("reconstruct",)) for n in NUMBERS},
        ("reconstruction",),
    ),
    "T5": Table(
        "what the frozen MLLM sees, read by queries, carries the subject",
        {
            "frozen MLLM, queries": QUERIES._replace(stages=INSTRUCT),
            "random MLLM, queries": Arm({"mllm": "random-mllm"}, INSTRUCT),
            "frozen MLLM, last layer": LAST_LAYER._replace(stages=INSTRUCT),
        },
        (*SUBJECTS, *[f"{kind}, pictures withheld" for kind in SUBJECTS]),
    ),
    "T8": Table(
        "drawing hardly depends on whether the language model was tuned on pictures",
        {"before": Arm({"mllm": "language/llm"}), "after": Arm({"mllm": "language/mllm"})},
        (*CAPTIONS, "commonsense"),
    ),
    "T10": Table(
        "trained on both, a model reconstructs, and draws captions as well as without",
        {
            "text-to-image": QUERIES,
            "reconstruction": QUERIES._replace(stages=("reconstruct",)),
            "mix": QUERIES._replace(stages=("mix",)),
        },
        (*CAPTIONS, "reconstruction"),
    ),
    "falsification": Table(
        "the further a prompt is from training, the fewer pictures are right",
        {"queries": QUERIES, "last layer": LAST_LAYER},
        ("attribution", "held-out", "two held-out", "position", "diagonal", "counting", "five"),
    ),
    "flags": Table(  # see data/flags.py and benchmarks/real_knowledge.py
        "queries carry what a real language model knows of countries to their flags",
        {
            "queries": FLAG_QUERIES,
            "random queries": FLAG_QUERIES._replace(config=FLAGS | {"condition_on": "random"}),
            "last layer": FLAG_QUERIES._replace(config=FLAGS | {"condition_on": "last_layer"}),
            "shuffled LLM": FLAG_QUERIES._replace(config=FLAGS | {"mllm": "flags/shuffled"}),
        },
        tuple(real_knowledge.MEASURES),
    ),
}
PARTS = frozen.PARTS | {"flags": real_knowledge.make_flags}


def train_all(table, args):
    """Train all arms that are not measured yet, --jobs at a time; they may share first stages."""
    unmeasured = [
        (arm, seed)
        for seed in range(args.seeds)
        for arm in table.arms.values()
        if not set(table.measures) <= set(read_scores(arm, seed, args))
    ]
    for part in {arm.config["mllm"].split("/")[0] for arm, _ in unmeasured if "mllm" in arm.config}:
        PARTS[part](args.work / part)
    depths = [len(arm.stages) for arm, _ in unmeasured]
    for depth in range(1, 1 + max(depths, default=0)):
        stages = {}
        for arm, seed in unmeasured:
            arm = arm._replace(stages=arm.stages[:depth])
            stages[folder_of(arm, seed, args)] = (arm, seed, args)
        with ThreadPoolExecutor(args.jobs) as pool:
            trained = pool.map(lambda stage: train(*stage), stages.values())
            list(tqdm(trained, "training", total=len(stages)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("name", metavar="NAME", choices=list(TABLES), help=", ".join(TABLES))
    add("--seeds", type=int, default=3, help="trainings of each arm (3)")
    add("--steps", type=int, default=900, help="of each stage of training (900)")
    add("--batch-size", type=int, default=32, help="samples a step (32)")
    # At 1e-3 the last layer learns slowly, and a real LLM's conditions become equal.
    add("--lr", type=float, default=3e-4, help="the highest learning rate (3e-4)")
    add("--limit", type=int, default=50, help="test cases of each measure (50)")
    add("--jobs", type=int, default=os.cpu_count(), help="trainings at a time (one a core)")
    add("--work", default="runs/tables", help="where models and scores are kept")
    add("--out", default="benchmarks/results", help="where NAME.json and NAME.png are written")
    args = parser.parse_args()
    check_bounds(vars(args), BOUNDS)
    args.work, args.out = writable(args.work, True).resolve(), writable(args.out, True)
    table, seeds = TABLES[args.name], list(range(args.seeds))
    arms = {}
    with errors_in_one_line():
        train_all(table, args)
        for name, arm in tqdm(table.arms.items(), "scoring"):
            scored = [score_arm(arm, table.measures, seed, args) for seed in seeds]
            arms[name] = arm._asdict() | summary(scored)
        settings = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "limit")}
        result = {"table": args.name, "claim": table.claim, "seeds": seeds}
        result |= {"settings": settings | {"drawing": DRAWING, "frozen_parts": frozen_digest()}}
        result["made on"] = []
        for arm, seed in product(table.arms.values(), seeds):
            made = read_scores(arm, seed, args)["made on"]
            if made not in result["made on"]:
                result["made on"].append(made)
        result["arms"] = arms
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print_table(result)
        save_figure(result, args.out / f"{args.name}.png")


if __name__ == "__main__":
    main()
