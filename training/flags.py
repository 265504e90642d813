"""train.py's flags, read from the source of its dataclasses.

So --help and bad flags are answered at once: nothing slow is imported, and each flag's help is the
comment beside its field.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import NamedTuple

from cli import MAX_SEED, begin, check_bounds, number, parse_data, stop, writable
from data.stages import NEEDS_CHECKPOINT, recipe

ROOT = Path(__file__).resolve().parent.parent
BOUNDS = {
    "steps": (1, 10**8),
    "batch_size": (1, 10**6),
    "micro_batch_size": (0, 10**6),
    "lr": (1e-12, 1),
    "warmup": (0, 10**8),
    "weight_decay": (0, 1),
    "max_grad_norm": (1e-12, 10**6),
    "sigma_shift": (0.01, 100),
    "seed": (0, MAX_SEED),
    "save_every": (1, 10**8),
    "keep": (1, 10**6),
    "sample_every": (1, 10**8),
    "workers": (0, 256),
    "num_queries": (1, 65_536),
    "connector_layers": (1, 1000),
    "image_guidance": (0, 100),
}


class Field(NamedTuple):
    """One field of a dataclass."""

    name: str
    type: str  # "int", "float", "str", "bool" or "Literal[...]"
    default: object  # None if it has none
    comment: str


def fields_of(file, name):
    """The fields of a dataclass in one of the project's files, a list of `Field`."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == name)
    fields = []
    for node in body:
        if isinstance(node, ast.AnnAssign):
            default = ast.literal_eval(node.value) if node.value else None
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            fields.append(Field(node.target.id, ast.unparse(node.annotation), default, comment))
    return fields


def true_or_false(text):
    """ "true" or "false" to a bool."""
    return ("false", "true").index(text.lower()) == 1


def add_flag(group, field):
    """Add a field's flag, without a default, so that flags given can be told from those not."""
    flag = "--" + field.name.replace("_", "-")
    default = "none" if field.default in (None, "") else str(field.default).lower()
    options = {"default": None, "help": f"{field.comment} ({default})".strip()}
    if field.type.startswith("Literal"):
        choices = ast.literal_eval(field.type.removeprefix("Literal"))
        group.add_argument(flag, choices=choices, **options)
    elif field.type == "bool":
        group.add_argument(
            flag, nargs="?", const=True, type=true_or_false, metavar="true|false", **options
        )
    else:
        types = {"int": int, "float": number, "str": str}
        group.add_argument(flag, type=types[field.type], metavar=field.type.upper(), **options)


def check_out(out, checkpoint):
    """Stop unless --out is a new or empty folder, or one that a run of ours wrote."""
    folder = writable(out, is_folder=True)
    if checkpoint and folder.resolve() == Path(checkpoint).resolve():
        stop(f"--out {out} is --checkpoint itself, which would be overwritten: name another --out.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and "run.lock" not in names and not list(folder.glob("step-*/training.json")):
        stop(f"--out {out} holds files that no run wrote ({names[0]}): name another --out.")


def parse_flags(description):
    """({field: value} of TrainConfig, {field: value} of MetaQueryConfig that were given)."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    begin(parser)
    train_fields = fields_of("train.py", "TrainConfig")
    model_fields = fields_of("metaquery.py", "MetaQueryConfig")
    title = "the run (defaults of the toy world's pretrain; other sizes: the paper's)"
    run = parser.add_argument_group(title)
    shown = recipe("tiny", "pretrain")
    for field in train_fields:
        add_flag(run, field._replace(default=shown.get(field.name, field.default)))
    model = parser.add_argument_group("the model (defaults: those of --size, or the checkpoint's)")
    for field in model_fields:
        add_flag(model, field)
    argv = [part.replace("_", "-") if part.startswith("--") else part for part in sys.argv[1:]]
    given = {n: value for n, value in vars(parser.parse_args(argv)).items() if value is not None}
    check_bounds(given, BOUNDS)
    changes = {field.name: given[field.name] for field in model_fields if field.name in given}
    chosen = {field.name: given[field.name] for field in train_fields if field.name in given}
    values = {field.name: field.default for field in train_fields} | chosen
    values |= recipe(values["size"], values["stage"]) | chosen
    if values["stage"] in NEEDS_CHECKPOINT and not values["checkpoint"]:
        stop(f"--stage {values['stage']} fine-tunes a model: give --checkpoint DIR.")
    if values["shard_frozen"] and not values["shard"]:
        stop("--shard-frozen needs --shard true: give both, or neither.")
    if values["shard"] and values["cache_prompts"]:  # processes would meet different new prompts
        stop("--cache-prompts needs the whole MLLM in each process: leave out one of the two.")
    parse_data(values["data"])
    check_out(values["out"], values["checkpoint"])
    return values, changes
