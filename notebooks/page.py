"""What the page (app.py) shows, without its layout: examples, a picture while it is drawn, and what
the queries look at, as HTML."""

import base64
import html
import io
import itertools
import queue
import uuid
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from sample import draw
from sample import open_picture
from metaquery import InputError, clean_prompt, to_rgb
from notebooks.inside import attention_maps
from toy.scene import Object, Scene, render

PAIR = Scene((Object("star", "red", 16, 32, 24), Object("circle", "blue", 48, 32, 24)))
CROSS, DIAMOND = Scene((Object("cross", "green"),)), Scene((Object("diamond", "pink"),))
EXAMPLES = (  # mode, prompt, source pictures; the shipped weights draw each of them right
    ("draw", "a red star left of a blue circle", ()),
    ("draw", "three green crosses", ()),
    ("draw", "a circle the colour of a ripe banana", ()),
    ("edit", "make the circle green", (PAIR,)),
    ("edit", "swap the star and the circle", (PAIR,)),
    ("edit", "turn the star into a cross", (PAIR,)),
    ("reconstruct", "", (PAIR,)),
    ("subjects", "two of this object", (CROSS,)),
    ("subjects", "both objects side by side", (CROSS, DIAMOND)),
    ("ask", "how many stars?", (PAIR,)),
)
WORKER = ThreadPoolExecutor(1)  # models are not thread-safe: this one thread runs them
STYLE = """<style>.maps table, .maps tr, .maps th, .maps td {border: 0 !important}
.maps table {width: 100%; table-layout: fixed} .maps th {font: 12px system-ui; text-align: center}
.maps th, .maps td {padding: 1px 3px !important} .maps td {background-clip: content-box}
.maps h4 {margin: 14px 0 6px}
.maps div {display: grid; grid-template-columns: repeat(8, 1fr); gap: 6px}
.maps figure {margin: 0; font: 11px system-ui; text-align: center}
.maps img {width: 100%; margin: 0; border-radius: 4px}</style>"""


def example(number):
    """(mode, prompt, source pictures) of one of the EXAMPLES."""
    mode, prompt, scenes = EXAMPLES[number]
    return mode, prompt, [render(scene) for scene in scenes]


def read_request(mode, prompt, files):
    """(prompt, PIL images) that a mode takes of a text and picture files.

    Raises ValueError with one line if something is missing or a file is no picture."""
    prompt = "" if mode == "reconstruct" else " ".join(prompt.split())
    images = [] if mode == "draw" else [open_picture(path) for path in files]
    if not prompt and mode != "reconstruct":
        raise ValueError("the prompt is empty: write a few words.")
    if not images and mode not in ("draw", "ask"):
        raise ValueError("there is no source picture: upload, paint or draw one.")
    return prompt, images


def more_sources(mode, files, picture):
    """The source pictures after a click on one: it replaces them, or is one more subject. Without a
    picture they stay as they are."""
    files = files or []
    if picture is None:
        return files
    return [*files, picture] if mode == "subjects" else [picture]


def use_painting(mode, files, painting):
    """The same for what was painted in gradio's editor."""
    return more_sources(mode, files, painting["composite"])


def film(model, prompt, images, args):
    """Draw, and yield (PIL images, done): about ten times ([a guess of the first picture], False),
    then (the pictures, True). Raises what drawing raises."""
    frames = queue.Queue()
    steps = itertools.count()
    every = max(1, args.steps // 10)

    def keep(guess):
        if next(steps) % every == 0:
            frames.put(model.decode_latents(guess)[0])

    job = WORKER.submit(draw, model, [(prompt, images)], args, callback=keep)
    job.add_done_callback(lambda _: frames.put(None))
    while frame := frames.get():
        yield [unlike_others(frame)], False
    yield [unlike_others(picture) for picture in job.result()[0]], True


def unlike_others(picture):
    """The picture with a note that makes its file unlike any other: gradio names files by content,
    and would write to one that a browser is still reading."""
    picture.info["drawing"] = uuid.uuid4().hex
    return picture


def patch_maps(model, images, inputs, maps):
    """For each picture the attention to its patches, (layers, heads, N, rows, columns).

    maps: the attention weights (layers, heads, N, T) to the prompt that `inputs` holds.
    """
    vision = model.mllm.config.vision_config
    if "image_grid_thw" in inputs:  # Qwen2.5-VL, which makes one token of several patches
        grids = (inputs["image_grid_thw"][:, 1:] // vision.spatial_merge_size).tolist()
        gap = 0
    else:  # LLaVA-OneVision, with a line break after each picture, and closer views of a single one
        grids = [[vision.image_size // vision.patch_size] * 2] * len(images)
        gap = 1
    is_patch = inputs["input_ids"][0] == model.mllm.config.image_token_id
    rest = maps[..., is_patch.to(maps.device)]
    found = []
    for rows, columns in grids:
        found.append(rest[..., : rows * columns].unflatten(-1, (rows, columns)))
        rest = rest[..., rows * columns + gap :]
    return found


def light_up(picture, weights):
    """An HTML <img> of a picture, dark but for the patches with much weight (rows, columns)."""
    rows, columns = weights.shape
    size = (160, 160 * rows // columns)
    picture = ImageOps.fit(to_rgb(picture), size, Image.Resampling.NEAREST)  # as the MLLM crops it
    dark = Image.blend(picture, Image.new("RGB", size, (30, 30, 60)), 0.85)
    light = Image.fromarray((255 * weights / weights.max()).byte().cpu().numpy())
    mask = light.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    Image.composite(picture, dark, mask).save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def name_of_head(maps, index):
    """ "layer 3, head 1" for an index into the flattened layers and heads of maps."""
    return "layer {}, head {}".format(*divmod(index, maps.shape[1]))


def look_inside(model, prompt, images=(), most=16):
    """HTML that shows what each of the first `most` queries looks at: words, and patches.

    Of all heads it shows the one whose queries look at the most different words (their mutual
    information is largest) and, for each picture, the one that looks hardest at single patches.
    Raises InputError if the model has no queries.
    """
    if model.config.condition_on == "last_layer":
        raise InputError("this model has no queries: its condition is the MLLM's last layer.")
    prompt = clean_prompt(model.tokenizer, prompt)
    maps, tokens = attention_maps(model, prompt, images)  # (layers, heads, N, T)
    end = len(tokens) - 1 - tokens[::-1].index("<|im_end|>")
    start = end - len(model.tokenizer.tokenize(prompt))
    page = STYLE
    if prompt:
        own = maps[..., start:end].flatten(0, 1).clamp(min=1e-9)  # (layers * heads, N, words)
        differ = (own * (own / own.mean(1, keepdim=True)).log()).sum((1, 2))
        index = differ.argmax().item()
        head = own[index][:most]  # (queries, words)
        words = [model.tokenizer.convert_tokens_to_string([token]) for token in tokens[start:end]]
        cells = "".join(f"<th>{html.escape(word)}</th>" for word in words)
        page += f"<h4>Words that each query looks at ({name_of_head(maps, index)})</h4>"
        style = "writing-mode: vertical-rl" if len(words) > 8 else ""
        page += f'<table><tr style="{style}"><th></th>{cells}</tr>'
        for number, row in enumerate((head / head.max()).tolist()):
            color = "background-color: rgba(234, 88, 12, {:.2f})"
            cells = "".join(f'<td style="{color.format(weight)}"></td>' for weight in row)
            page += f"<tr><th>query {number}</th>{cells}</tr>"
        page += "</table>"
    inputs = model.prepare_inputs([prompt], [list(images)])
    found = patch_maps(model, images, inputs, maps) if images else []
    for picture, patches in zip(images, found, strict=True):
        patches = patches.flatten(0, 1)  # (layers * heads, N, rows, columns)
        index = patches.amax((2, 3)).mean(1).argmax().item()
        page += f"<h4>Patches that each query looks at ({name_of_head(maps, index)})</h4><div>"
        for number, query in enumerate(patches[index][:most]):
            page += f"<figure>{light_up(picture, query)}query {number}</figure>"
        page += "</div>"
    return f'<section class="maps">{page}</section>'
