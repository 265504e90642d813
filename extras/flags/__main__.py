"""Flags drawn from what a frozen language model knows: the experiment's parts, and its scorer.

    python -m extras.tables flags --steps 1800 --lr 2e-4   train and score all arms, three seeds
    python -m extras.flags                        make the parts only
    python -m extras.flags --checkpoint DIR       score one model, in more detail

The last prints the share of right flags for each way to ask, and how often a question's condition
is nearest to that of the right country's name: if it is and the flag is wrong, the drawing lost it.
Then it asks for the flags of the countries whose capitals were held out, and the model's LLM for
their names in text: --out gets what each question came to, and a .png beside it some drawn flags,
each left of the right one.

`make_flags` makes what the arms share, in this order: pictures and prompts (data/flags.py); the
language model, and one whose weights are shuffled; the toy VAE and the toy diffusion model,
fine-tuned to draw the flags by name. The diffusion model reads a caption by the language model's
input embeddings of its tokens, before any layer: it knows the countries by name alone.
"""

import argparse
import json
from itertools import chain, product

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.tables.frozen import run
from cli import begin, check_bounds, errors_in_one_line, writable
from sample import DRAWING_BOUNDS, add_drawing_options, draw, load_model
from extras.flags.dataset import LLM, code_of, flags, questions
from sample import grid, save_picture
from metaquery import TINY
from extras.toy_parts.fit import Run, fit, pictures_to_tensor
from extras.toy_parts.__main__ import draw as draw_captions
from extras.toy_parts.__main__ import redraw_loss, save_pipeline, velocity_loss

SHUFFLED = "shuffled"  # the folder of the language model with shuffled weights
VAE_STEPS, DIFFUSION_STEPS = 600, 2000
CAPTION_SCALE = 5.5**0.5  # of tokens' states: the gain with which a connector starts

# Measures of benchmarks/tables.py: of which split, and of which relation.
MEASURES = {
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

# ---- The frozen parts ----------------------------------------------------------------------------


def shuffle_llm(source, folder):
    """The language model with the numbers of each weight matrix in random order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel())
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model.save_pretrained(folder)


def token_states(llm, width):
    """A language model's tokenizer, and a state of `width` numbers for each of its V tokens.

    A token's state is its input embedding, less the mean, in a fixed random projection; all are as
    long as a connector's first conditions. Returns (tokenizer, (V, width)).
    """
    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    words = model.get_input_embeddings().weight.detach()  # (V, d)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(words.shape[1], width, generator=generator)
    projected = (words - words.mean(0)) @ projection  # (V, width)
    return tokenizer, CAPTION_SCALE * width**0.5 * F.normalize(projected, dim=-1)


def caption_states(captions, tokenizer, vectors):
    """States (B, L, width) of the captions' tokens, of `vectors` (V, width), and their mask (B, L).

    Every caption ends with the end token, so that an empty one has a state too.
    """
    texts = [caption + tokenizer.eos_token for caption in captions]
    rows = [vectors[ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)


def train_flag_vae(parts, pictures):
    """The toy VAE, fine-tuned to redraw flags."""
    vae = AutoencoderDC.from_pretrained(TINY / "diffusion" / "vae", torch_dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    pixels = pictures_to_tensor(list(pictures.values()))

    def make(rng):
        return {"pixels": pixels[rng.choices(range(len(pixels)), k=parts.batch_size)]}

    def loss_of(batch):
        return redraw_loss(vae, batch["pixels"])

    @torch.no_grad()
    def evaluate():
        latents = vae.encode(pixels).latent
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        redrawn = vae.decode(latents).sample.clamp(-1, 1)
        return {"redrawn flags that are nearest themselves": share_right(redrawn, pixels)}

    fit("vae", [vae], make, loss_of, 1e-3, parts, evaluate)
    return vae


def train_flag_diffusion(parts, vae, pictures):
    """The toy diffusion model, fine-tuned to draw flags by captions that name them."""
    sana = SanaTransformer2DModel.from_pretrained(
        TINY / "diffusion" / "transformer", torch_dtype=torch.float32
    )
    scheduler = DPMSolverMultistepScheduler.from_pretrained(TINY / "diffusion" / "scheduler")
    rows = questions(parts.out, "trained", "name")
    tokenizer, vectors = token_states(parts.out / LLM, sana.config.caption_channels)
    pixels = {code: pictures_to_tensor([picture])[0] for code, picture in pictures.items()}

    def make(rng):
        chosen = rng.choices(rows, k=parts.batch_size)
        captions = ["" if rng.random() < 0.1 else row["text"] for row in chosen]
        states, mask = caption_states(captions, tokenizer, vectors)
        targets = torch.stack([pixels[code_of(row)] for row in chosen])
        return {"pixels": targets, "states": states, "mask": mask}

    def loss_of(batch):
        return velocity_loss(sana, vae, batch["pixels"], batch["states"], batch["mask"])

    def evaluate():
        one_each = list({row["file_name"]: row for row in rows}.values())
        captions = [""] * len(one_each) + [row["text"] for row in one_each]
        drawn = draw_captions(sana, vae, scheduler, *caption_states(captions, tokenizer, vectors))
        return {"flags drawn by name": share_right(drawn, torch.stack(list(pixels.values())))}

    fit("diffusion", [sana], make, loss_of, 1e-3, parts, evaluate)
    return sana, vae, scheduler


def make_flags(folder):
    """Make all that the arms share in a folder, but for what is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LLM / "config.json").exists():
        run(["-m", "extras.flags.dataset", "--out", folder], folder.with_suffix(".log"))
    if not (folder / SHUFFLED / "config.json").exists():
        shuffle_llm(folder / LLM, folder / SHUFFLED)
    pictures, pipeline = flags(folder), folder / "diffusion"
    torch.manual_seed(0)
    if not (pipeline / "vae" / "config.json").exists():
        parts = Run(folder, VAE_STEPS, batch_size=32)
        train_flag_vae(parts, pictures).save_pretrained(pipeline / "vae")
    if not (pipeline / "model_index.json").exists():
        parts = Run(folder, DIFFUSION_STEPS, batch_size=32)
        vae = AutoencoderDC.from_pretrained(pipeline / "vae").eval()
        save_pipeline(pipeline, *train_flag_diffusion(parts, vae, pictures))


# ---- The scorer ----------------------------------------------------------------------------------


def nearest(drawn, known):
    """The indices of `known` (F, 3, H, W), the nearest first, for each of `drawn` (B, 3, H, W).

    Returns (B, F). Pictures are near if the mean squared difference of their pixels is small;
    conditions, (F, c) and (B, c), likewise.
    """
    return torch.cdist(drawn.flatten(1), known.flatten(1)).argsort(1)


def share_right(drawn, known):
    """The share of drawn pictures whose nearest of as many known ones is the one at their index.

    Flags that are the same picture, as Chad's and Romania's are here, count as each other.
    """
    first = nearest(drawn, known)[:, 0]
    return (known[first] == known).flatten(1).all(1).float().mean().item()


def ask(model, rows, args, known):
    """Draw rows of `questions`: for each its picture, and the five nearest flags' country codes.

    known: {country code: PIL image}. Of flags that are the same picture, the code asked for counts.
    """
    pictures = [drawn[0] for drawn in draw(model, [(row["text"], []) for row in rows], args)]
    pixels = pictures_to_tensor(list(known.values()))
    codes = list(known)
    found = []
    for row, order in zip(rows, nearest(pictures_to_tensor(pictures), pixels), strict=True):
        asked = codes.index(code_of(row))
        is_same = (pixels == pixels[asked]).flatten(1).all(1)
        order = [asked if is_same[i] else i for i in order.tolist()]
        found.append([codes[i] for i in dict.fromkeys(order)][:5])
    return pictures, found


def choose_questions(folder, name, limit):
    """`limit` questions of a measure, evenly spread over them and so over the countries."""
    rows = questions(folder, *MEASURES[name])
    limit = min(limit, len(rows))
    return [rows[i * len(rows) // limit] for i in range(limit)]


def measure_flags(model, name, args, folder):
    """{name: share whose nearest flag is the right one, and among the nearest five}."""
    rows = choose_questions(folder, name, args.limit)
    _, found = ask(model, rows, args, flags(folder))
    asked = [code_of(row) for row in rows]
    top_1 = [code == codes[0] for code, codes in zip(asked, found, strict=True)]
    top_5 = [code in codes for code, codes in zip(asked, found, strict=True)]
    return {name: sum(top_1) / len(rows), f"{name}, top 5": sum(top_5) / len(rows)}


def mean_conditions(model, rows):
    """The conditions of B questions, each averaged over its L states: (B, c), with gradient."""
    cond, mask = model.encode_prompts([row["text"] for row in rows])  # (B, L, c)
    mask = cond.new_ones(cond.shape[:2]) if mask is None else mask  # (B, L)
    weights = mask / mask.sum(1, keepdim=True)  # (B, L)
    return (weights[..., None] * cond).sum(1)  # (B, c)


@torch.no_grad()
def all_conditions(model, rows):
    """`mean_conditions` of any number of questions: (B, c)."""
    parts = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    return torch.cat([mean_conditions(model, part).float().cpu() for part in parts])


def read_conditions(model, args, folder):
    """{measure: share of its questions whose condition is nearest to that of their country's name}.

    A country's condition is the mean over the prompts in training that name it.
    """
    named = questions(folder, "trained", "name")
    codes = sorted({code_of(row) for row in named})
    labels = torch.tensor([codes.index(code_of(row)) for row in named])  # (B,)
    cond = all_conditions(model, named)  # (B, c)
    known = torch.stack([cond[labels == i].mean(0) for i in range(len(codes))])  # (F, c)
    shares = {}
    for name in MEASURES:
        rows = choose_questions(folder, name, args.limit)
        read = nearest(all_conditions(model, rows), known)[:, 0].tolist()
        right = [codes[i] == code_of(row) for i, row in zip(read, rows, strict=True)]
        shares[name] = sum(right) / len(rows)
    return shares


# ---- One model, case by case ---------------------------------------------------------------------

SHOWN = 24  # questions whose drawings are saved
START = "the flag of "  # of the prompts that are also asked in text


def ask_in_text(model, row):
    """The LLM's own answer to a prompt's question: "Which is the country whose capital is ...?" """
    return model.answer(f"Which is {row['text'].removeprefix(START)}?", max_new_tokens=40)


def cases_of(model, folder, args):
    """What each question about a held-out capital came to: its case, its drawing, and its flag."""
    rows = questions(folder, *MEASURES["by capital"])
    rows = [row for row in rows if row["text"].startswith(START)][: args.limit]
    country_of = {row["file_name"]: row["country"] for row in questions(folder)}
    all_flags = flags(folder)
    pictures, found = ask(model, rows, args, all_flags)
    cases = []
    for row, codes in zip(tqdm(rows, "answering"), found, strict=True):
        answer = ask_in_text(model, row)
        case = {"asked": row["text"], "country": row["country"]}
        case["nearest"] = [country_of[f"{code}.png"] for code in codes]
        case["drawn"] = case["nearest"][0] == row["country"]
        case["answer"] = answer
        case["known"] = row["country"] in answer
        cases.append(case)
    return cases, pictures, [all_flags[code_of(row)] for row in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("--data", default="runs/tables/flags", help="the folder of parts (runs/tables/flags)")
    add("--limit", type=int, default=80, help="how many questions of each sort (80)")
    add("--out", default="runs/flags.json", help="what each came to (runs/flags.json)")
    add_drawing_options(parser)
    args = parser.parse_args()
    check_bounds(vars(args), DRAWING_BOUNDS)
    out, folder = writable(args.out, is_folder=False), writable(args.data, is_folder=True)
    with errors_in_one_line():
        make_flags(folder)
        if not args.checkpoint:
            print(f"the parts are in {folder}")
            return
        model = load_model(args)
        read = read_conditions(model, args, folder)
        for name in MEASURES:
            (_, top_1), (_, top_5) = measure_flags(model, name, args, folder).items()
            drawn = f"drawn {top_1:.3f}, among the nearest five {top_5:.3f}"
            print(f"{name:>25}  {drawn}, read from the condition {read[name]:.3f}", flush=True)
        cases, pictures, right = cases_of(model, folder, args)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
        pairs = [*chain.from_iterable(zip(pictures, right, strict=True))][: 2 * SHOWN]
        sheet, credit = out.with_suffix(".png"), "flags: OpenMoji, CC BY-SA 4.0"
        save_picture(grid(pairs, 12), sheet, license=credit)
    for drawn, known in product((True, False), repeat=2):
        number = sum(case["drawn"] == drawn and case["known"] == known for case in cases)
        words = f"{'' if known else 'not '}named in text, {'' if drawn else 'not '}drawn"
        print(f"{words:>32}  {number} of {len(cases)}")
    print(f"wrote {out} and {sheet}")


if __name__ == "__main__":
    main()
