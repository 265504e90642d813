"""The tables of extras.tables: what the paper claims, and the variants that check it."""

from typing import NamedTuple

from extras.flags.flag_scores import METRICS as FLAG_METRICS
from extras.tables.variants import Variant
from toy.tasks import SIX_KINDS


class Table(NamedTuple):
    """What the paper claims, the variants that check it, and what is measured of each."""

    claim: str
    variants: dict
    metrics: tuple  # see extras/tables/metrics.py


INSTRUCT = ("pretrain", "instruct")
CAPTIONS = (*SIX_KINDS, "dense")
SUBJECTS = ("one subject", "two subjects")
QUERIES = Variant({"num_queries": 16})  # as in the preset
LAST_LAYER = Variant({"condition_on": "last_layer"})
FLAGS = {"mllm": "flags/smollm2", "diffusion": "flags/diffusion"}
FLAGS |= {"num_queries": 2, "connector_layers": 2}
# Which flag it is shows at high noise levels: more of them make it learn sooner.
FLAG_RUN = {"data": "flags/train", "cache_prompts": True, "sigma_shift": 3.0}
FLAG_QUERIES = Variant(FLAGS, run=FLAG_RUN)
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
TABLES = {
    "knowledge": Table(  # Tables 6, 7 and 9
        "queries carry the MLLM's knowledge to the image, its last layer does so less",
        {"queries": QUERIES, "last layer": LAST_LAYER},
        (*CAPTIONS, "knowledge", "commonsense", "commonsense, negative prompt"),
    ),
    "T1": Table(
        "queries align as well as the last layer, more of them better; random ones do not",
        {"last layer": LAST_LAYER, "random": Variant({"condition_on": "random"})}
        | {f"N = {n}": Variant({"num_queries": n}) for n in (4, 16, 64)},
        CAPTIONS,
    ),
    "T2": Table(
        "frozen, an MLLM serves as well as tuned, and still answers; tuning the diffusion helps",
        {
            "both frozen": Variant({"train_diffusion": False}),
            "diffusion tuned": QUERIES,
            "MLLM tuned": Variant({"train_mllm": True, "train_diffusion": False}),
            "both tuned": Variant({"train_mllm": True}),
        },
        (*CAPTIONS, "answers"),
    ),
    "T3": Table(
        "the connector enc-proj aligns better than proj-enc, with fewer parameters",
        {
            f"{design}, {layers}": Variant({"connector": design, "connector_layers": layers})
            for design in ("enc-proj", "proj-enc")
            for layers in (1, 3, 6)
        },
        CAPTIONS,
    ),
    "F2": Table(
        "more queries follow captions better, dense ones most of all",
        {f"N = {n}": Variant({"num_queries": n}) for n in NUMBERS},
        CAPTIONS,
    ),
    "F2-reconstruction": Table(
        "more queries reconstruct images better",
        {f"N = {n}": Variant({"num_queries": n}, ("reconstruct",)) for n in NUMBERS},
        ("reconstruction",),
    ),
    "T5": Table(
        "what the frozen MLLM sees, read by queries, carries the subject",
        {
            "frozen MLLM, queries": QUERIES._replace(stages=INSTRUCT),
            "random MLLM, queries": Variant({"mllm": "random-mllm"}, INSTRUCT),
            "frozen MLLM, last layer": LAST_LAYER._replace(stages=INSTRUCT),
        },
        (*SUBJECTS, *[f"{kind}, images withheld" for kind in SUBJECTS]),
    ),
    "T8": Table(
        "generation hardly depends on whether the language model was tuned on images",
        {"before": Variant({"mllm": "language/llm"}), "after": Variant({"mllm": "language/mllm"})},
        (*CAPTIONS, "commonsense"),
    ),
    "T10": Table(
        "trained on both, a model reconstructs, and follows captions as well as without",
        {
            "text-to-image": QUERIES,
            "reconstruction": QUERIES._replace(stages=("reconstruct",)),
            "mix": QUERIES._replace(stages=("mix",)),
        },
        (*CAPTIONS, "reconstruction"),
    ),
    "falsification": Table(
        "the further a prompt is from training, the fewer images are right",
        {"queries": QUERIES, "last layer": LAST_LAYER},
        ("attribution", "held-out", "two held-out", "position", "diagonal", "counting", "five"),
    ),
    "flags": Table(  # see extras/flags
        "queries carry what a real language model knows of countries to their flags",
        {
            "queries": FLAG_QUERIES,
            "random queries": FLAG_QUERIES._replace(config=FLAGS | {"condition_on": "random"}),
            "last layer": FLAG_QUERIES._replace(config=FLAGS | {"condition_on": "last_layer"}),
            "shuffled LLM": FLAG_QUERIES._replace(config=FLAGS | {"mllm": "flags/shuffled"}),
        },
        tuple(FLAG_METRICS),
    ),
}
