"""Flags generated from what a frozen language model knows: the experiment's parts and its scorer.

    python -m extras.tables flags --steps 1800 --lr 2e-4   train and score all variants, three seeds
    python -m extras.flags                        make the parts only
    python -m extras.flags --checkpoint DIR       score one model, in more detail

The last prints the share of right flags for each way to ask. Then it asks for the flags of the
countries whose capitals were held out, and the model's LLM for their names in text: --out gets what
each question came to, and a .png beside it some generated flags, each left of the right one.
"""

import json
from itertools import chain, product

from cli import bounded, check_writable, errors_in_one_line, open_parser
from extras.flags.flag_parts import make_flags
from extras.flags.flag_scores import METRICS, cases_of, measure_flags
from sample import add_generation_options, grid, load_model, save_image

SHOWN = 24  # questions whose images are saved


def main():
    parser = open_parser(__doc__)
    add = parser.add_argument
    add("--data", default="runs/tables/flags", help="the folder of parts (runs/tables/flags)")
    add("--limit", type=bounded(int, 1, 10**6), default=80, help="questions of each sort (80)")
    add("--out", default="runs/flags.json", help="what each came to (runs/flags.json)")
    add_generation_options(parser)
    args = parser.parse_args()
    out = check_writable(args.out, is_folder=False)
    folder = check_writable(args.data, is_folder=True)

    with errors_in_one_line():
        make_flags(folder)
        if not args.checkpoint:
            print(f"the parts are in {folder}")
            return
        model = load_model(args)
        for name in METRICS:
            top_1, top_5 = measure_flags(model, name, args, folder).values()
            print(f"{name:>25}  {top_1:.3f}, among the nearest five {top_5:.3f}", flush=True)

        cases, images, right = cases_of(model, folder, args)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
        sheet = list(chain.from_iterable(zip(images, right, strict=True)))
        note = {"license": "flags: OpenMoji, CC BY-SA 4.0"}
        save_image(grid(sheet[: 2 * SHOWN], 12), out.with_suffix(".png"), **note)

        for drawn, known in product((True, False), repeat=2):
            number = sum(case["drawn"] == drawn and case["known"] == known for case in cases)
            words = f"{'' if known else 'not '}named in text, {'' if drawn else 'not '}generated"
            print(f"{words:>36}  {number} of {len(cases)}")
        print(f"wrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
