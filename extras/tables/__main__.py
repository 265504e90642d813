"""The paper's tables, small: variants trained alike on the toy world, scored exactly.

    python -m extras.tables knowledge       train, score and plot one table, three seeds a variant
    python -m extras.tables T1 --seeds 5    more seeds; what is there already is kept

A variant is some fields of MetaQueryConfig and the stages it is trained in. train.py trains all
from the same frozen parts, on the same data and for as many steps; a variant that several tables
name is trained once. Stopped at any time, the same command resumes: models, and what was measured
of them, are kept in --work. Two files are written, NAME.png and NAME.json of extras/tables/results.

Figures have one value a seed, which is the seed of weights, training data and test cases. All are
shares of right images or answers, but for "PSNR in dB", "training loss", "samples per second"
and "saved parameters". The spread is the standard deviation over seeds (of a sample: n - 1).
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from tqdm import tqdm

from cli import bounded, check_writable, errors_in_one_line, open_parser
from extras.tables.claims import TABLES
from extras.tables.metrics import GENERATION, print_table, save_figure, summary
from extras.tables.variants import PARTS, folder_of, frozen_digest, read_scores, score, train

RESULTS = Path(__file__).resolve().parent / "results"


def train_all(table, args):
    """Train all that is not measured yet, --jobs at a time; variants may share first stages."""
    unmeasured = [
        (variant, seed)
        for seed in range(args.seeds)
        for variant in table.variants.values()
        if not set(table.metrics) <= set(read_scores(variant, seed, args))
    ]
    mllms = [variant.config["mllm"] for variant, _ in unmeasured if "mllm" in variant.config]
    for part in {name.split("/")[0] for name in mllms}:
        PARTS[part](args.work / part)

    depths = [len(variant.stages) for variant, _ in unmeasured]
    for depth in range(1, 1 + max(depths, default=0)):
        stages = {}
        for variant, seed in unmeasured:
            variant = variant._replace(stages=variant.stages[:depth])
            stages[folder_of(variant, seed, args)] = (variant, seed, args)
        with ThreadPoolExecutor(args.jobs) as pool:
            trained = pool.map(lambda stage: train(*stage), stages.values())
            list(tqdm(trained, "training", total=len(stages)))


def result_of(table, args):
    """Train and score all variants of a table: what NAME.json holds."""
    train_all(table, args)
    variants = {}
    for name, variant in tqdm(table.variants.items(), "scoring"):
        scores = [score(variant, table.metrics, seed, args) for seed in range(args.seeds)]
        variants[name] = variant._asdict() | summary(scores)

    machines = []
    for variant, seed in product(table.variants.values(), range(args.seeds)):
        machine = read_scores(variant, seed, args)["made on"]
        if machine not in machines:
            machines.append(machine)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "limit")}
    settings |= {"generation": GENERATION, "frozen_parts": frozen_digest()}
    result = {"table": args.name, "claim": table.claim, "seeds": list(range(args.seeds))}
    return result | {"settings": settings, "made on": machines, "variants": variants}


def main():
    parser = open_parser(__doc__)
    number = bounded(int, 1, 10**6)
    add = parser.add_argument
    add("name", metavar="NAME", choices=list(TABLES), help=", ".join(TABLES))
    add("--seeds", type=number, default=3, help="trainings of each variant (3)")
    add("--steps", type=number, default=900, help="of each stage of training (900)")
    add("--batch-size", type=number, default=32, help="samples a step (32)")
    # At 1e-3 the last layer learns slowly, and a real LLM's conditions become equal.
    add("--lr", type=bounded(float, 1e-6, 1), default=3e-4, help="highest learning rate (3e-4)")
    add("--limit", type=number, default=50, help="test cases of each metric (50)")
    add("--jobs", type=number, default=os.cpu_count(), help="trainings at a time (one a core)")
    add("--work", default="runs/tables", help="where models and scores are kept")
    add("--out", default=str(RESULTS), help="where NAME.json and NAME.png are written")
    args = parser.parse_args()
    args.work = check_writable(args.work, is_folder=True).resolve()
    args.out = check_writable(args.out, is_folder=True)

    with errors_in_one_line():
        result = result_of(TABLES[args.name], args)
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2) + "\n"
        (args.out / f"{args.name}.json").write_text(text, encoding="utf-8")
        print_table(result)
        save_figure(result, args.out / f"{args.name}.png")


if __name__ == "__main__":
    main()
