"""How well a model generates flags that it is asked for by what a language model knows."""

from tqdm import tqdm

from extras.flags.dataset import SIDE, code_of, flags, questions
from extras.flags.flag_parts import nearest
from metaquery import to_pixels
from sample import generate

# Metrics of the flags table: of which split, and of which relation.
METRICS = {
    "by name": ("trained", "name"),
    "by name, new wordings": ("new wording", "name"),
    "by capital, trained": ("trained", "capital"),
    "by capital": ("held-out", "capital"),
    "by currency": ("held-out", "currency"),
    "by neighbours": ("held-out", "neighbours"),
    "by place or person": ("held-out", "place"),
    "by city, never trained": ("never trained", "city"),
    "by domain, never trained": ("never trained", "domain"),
}
START = "the flag of "  # prompts that begin so are also asked in text


def ask(model, rows, args, known):
    """Generate for rows of `questions`: their images, and the five nearest flags' country codes.

    known: {country code: PIL image}. Of flags that are the same image, the code asked for counts.
    """
    images = [row[0] for row in generate(model, [(row["text"], []) for row in rows], args)]
    pixels = to_pixels(known.values(), SIDE)
    codes = list(known)

    found = []
    for row, order in zip(rows, nearest(to_pixels(images, SIDE), pixels), strict=True):
        asked = codes.index(code_of(row))
        is_same = (pixels == pixels[asked]).flatten(1).all(1)
        order = [asked if is_same[i] else i for i in order.tolist()]
        found.append([codes[i] for i in dict.fromkeys(order)][:5])
    return images, found


def choose_questions(folder, name, limit):
    """`limit` questions of a metric, evenly spread over them and so over the countries."""
    rows = questions(folder, *METRICS[name])
    limit = min(limit, len(rows))
    return [rows[i * len(rows) // limit] for i in range(limit)]


def measure_flags(model, name, args, folder):
    """{name: share whose nearest flag is the right one, and among the nearest five}."""
    rows = choose_questions(folder, name, args.limit)
    _, found = ask(model, rows, args, flags(folder))
    pairs = [(code_of(row), codes) for row, codes in zip(rows, found, strict=True)]
    top_1 = [code == codes[0] for code, codes in pairs]
    top_5 = [code in codes for code, codes in pairs]
    return {name: sum(top_1) / len(rows), f"{name}, top 5": sum(top_5) / len(rows)}


def cases_of(model, folder, args):
    """What each question about a held-out capital came to: cases, generated images, right flags.

    A case also says whether the model's LLM names the country in text: "Which is the country whose
    capital is ...?"
    """
    rows = questions(folder, *METRICS["by capital"])
    rows = [row for row in rows if row["text"].startswith(START)][: args.limit]
    country_of = {row["file_name"]: row["country"] for row in questions(folder)}
    all_flags = flags(folder)
    images, found = ask(model, rows, args, all_flags)

    cases = []
    for row, codes in zip(tqdm(rows, "answering"), found, strict=True):
        question = f"Which is {row['text'].removeprefix(START)}?"
        answer = model.answer(question, max_new_tokens=40)
        case = {"asked": row["text"], "country": row["country"]}
        case["nearest"] = [country_of[f"{code}.png"] for code in codes]
        case["drawn"] = case["nearest"][0] == row["country"]
        case["answer"] = answer
        case["known"] = row["country"] in answer
        cases.append(case)
    return cases, images, [all_flags[code_of(row)] for row in rows]
