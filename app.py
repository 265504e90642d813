"""Generate images with MetaQuery in the browser: what sample.py does, on a page.

pip install gradio && python app.py        the shipped model
python app.py --checkpoint openuni-b-512   any model; flags say where the sliders start
"""

import argparse
import itertools
import queue
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import cli
from sample import add_generation_options, generate, load_model, open_image, restate, unchanged
from toy.scene import COLORS, Object, Scene, render

BUTTONS = {  # for each mode
    "generate": "Generate", "edit": "Edit", "reconstruct": "Reconstruct",
    "subjects": "Generate these subjects", "ask": "Ask",
}  # fmt: skip
PAIR = Scene((Object("star", "red", 16, 32, 24), Object("circle", "blue", 48, 32, 24)))
CROSS = Scene((Object("cross", "green"),))
DIAMOND = Scene((Object("diamond", "pink"),))
EXAMPLES = (  # mode, prompt, source scenes; the shipped model does each of them right
    ("generate", "a red star left of a blue circle", ()),
    ("generate", "three green crosses", ()),
    ("generate", "a circle the colour of a ripe banana", ()),
    ("edit", "make the circle green", (PAIR,)),
    ("edit", "swap the star and the circle", (PAIR,)),
    ("edit", "turn the star into a cross", (PAIR,)),
    ("reconstruct", "", (PAIR,)),
    ("subjects", "two of this object", (CROSS,)),
    ("subjects", "both objects side by side", (CROSS, DIAMOND)),
    ("ask", "how many stars?", (PAIR,)),
)
# In a wide window the second column has the image; on a phone it is under the button.
CSS = """
#shown img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.thumbs {border: 1px solid var(--border-color-primary) !important}
.thumbs .grid-wrap {margin-top: 26px}
#columns {display: grid; grid-template-columns: 1fr}
@media (min-width: 760px) {
  #columns {grid-template-columns: 1fr 1fr}
  #result {grid-column: 2; grid-row: 1 / span 2}
}"""
# gradio opens its sheet without a tool.
TAKE_BRUSH = """() => setTimeout(
  () => document.querySelector('button[aria-label="Brush"]')?.click(), 500)"""
WORKER = ThreadPoolExecutor(1)  # models are not thread-safe: this one thread runs them


# ---- What the page does, without its layout -----------------------------------------
def read_request(mode, prompt, files):
    """(prompt, PIL images) that a mode takes of a text and a gallery's (file, caption).

    Raises ValueError with one line if something is missing or a file is no image."""
    prompt = " ".join((prompt or "").split())
    if mode == "reconstruct":
        prompt = ""
    elif not prompt:
        raise ValueError("the prompt is empty: write a few words.")

    images = []
    if mode != "generate":
        images = [open_image(path) for path, _ in files or ()]
        if not images and mode != "ask":
            raise ValueError("there is no source image: upload, paint or generate one.")
    return prompt, images


def read_settings(args, **values):
    """The flags with what the page sets; raises ValueError if a number is wrong."""
    bounds = {"steps": (int, 1, 1000), "seed": (int, 0, cli.MAX_SEED),
              "num_images": (int, 1, 24), "guidance": (float, 0, 100),
              "image_guidance": (float, 0, 100)}  # fmt: skip
    for name, bound in bounds.items():
        parse = cli.bounded(*bound)
        try:
            values[name] = parse(str(values[name]))
        except ValueError:
            problem = f"{name} is {values[name]}: give a {parse.__name__}."
            raise ValueError(problem) from None
    return argparse.Namespace(**(vars(args) | values))


def add_source(mode, files, image):
    """The source images with one more: another subject, or in place of the others."""
    if mode == "subjects":
        return [*(files or []), image]
    return [image]


class Stopped(Exception):
    """Raised in the thread that generates when nobody waits for the images any more."""


def film(model, prompt, images, args):
    """Generate, and yield (PIL images, done): about ten times a guess of the first one,
    then all. Raises what generating raises. Closing this generator stops it."""
    frames = queue.Queue()
    steps = itertools.count()
    every = max(1, args.steps // 10)
    closed = False

    def keep(guess):
        if closed:
            raise Stopped
        if next(steps) % every == 0:
            frames.put(model.decode_latents(guess[:1])[0])

    rows = [(prompt, images)]
    job = WORKER.submit(generate, model, rows, args, callback=keep)
    job.add_done_callback(lambda _: frames.put(None))
    try:
        while frame := frames.get():
            yield [unlike_others(frame)], False
        yield [unlike_others(image) for image in job.result()[0]], True
    finally:
        closed = True


def unlike_others(image):
    """The image with a note that makes its file unlike any other: gradio names files by
    content, and would write to one that a browser is still reading."""
    image.info["unique"] = uuid.uuid4().hex
    return image


def describe_model(model, checkpoint):
    """What a model can generate, by its card's "What it knows": (a line, all or "")."""
    card = Path(checkpoint) / "README.md"
    details = ""
    if card.exists():
        text = card.read_text(encoding="utf-8")
        details = text.partition("## What it knows")[2].partition("\n## ")[0].strip()
    if details:
        first = " ".join(details.removeprefix("- ").split("\n- ")[0].split())
        return f"It knows: {first[0].lower()}{first[1:]}", details
    scale = model.downsampling
    height, width = (scale * side for side in model.latent_size(None, None))
    return f"{Path(checkpoint).name}: images of {width} × {height} pixels.", ""


@contextmanager
def errors_shown():
    """Turn errors of the input into gradio's, without the folder of uploads."""
    import gradio as gr
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        message = "out of memory: ask for fewer images."
    except ValueError as error:  # InputError is one
        message = re.sub(r"/\S*/", "", str(error))
    else:
        return
    raise gr.Error(message, print_exception=False)


# ---- The page -----------------------------------------------------------------------
def make_page(model, args):
    """The page of a model, gradio Blocks; args are the flags."""
    import gradio as gr

    from notebooks.inside import look_inside

    line, details = describe_model(model, args.checkpoint)
    is_toy = model.resolution <= 64
    examples = EXAMPLES
    if not is_toy:
        examples = [("generate", "a photo of a corgi on a beach", ())]

    def run(
        mode, prompt, files, negative_prompt, guidance, image_guidance, steps, seed,
        num_images, generated,
    ):  # fmt: skip
        """Generate or answer: yields (image, text, all that was generated)."""
        with errors_shown():
            prompt, images = read_request(mode, prompt, files)
            if mode == "ask":
                text = WORKER.submit(model.answer, prompt, images).result()
                yield gr.skip(), gr.Textbox(text, label="Answer"), gr.skip()
                return
            settings = read_settings(
                args, negative_prompt=negative_prompt or "", guidance=guidance,
                image_guidance=image_guidance, steps=steps, seed=seed,
                num_images=num_images,
            )  # fmt: skip

            text = WORKER.submit(restate, model, prompt, images).result()
            yield gr.skip(), gr.Textbox(text, label="Drawn as"), gr.skip()
            for frames, done in film(model, prompt, images, settings):
                kept, note = gr.skip(), gr.skip()
                if done:
                    kept = [(image, prompt or mode) for image in frames]
                    kept += (generated or [])[:23]
                    asked = (model, prompt, images, frames[0])
                    line = WORKER.submit(unchanged, *asked).result()
                    note = f"{text}\n{line}".strip()
                yield gr.Image(frames[0], alt_text=prompt), note, kept

    def inside(mode, prompt, files):
        """What the queries look at, as HTML."""
        with errors_shown():
            request = read_request(mode, prompt, files)
            return WORKER.submit(look_inside, model, *request).result()

    def adapt(mode):
        """Show what a mode takes."""
        return (
            gr.Textbox(visible=mode != "reconstruct"),
            gr.Group(visible=mode != "generate"),
            BUTTONS[mode],
            gr.Slider(visible=mode not in ("generate", "ask")),
            gr.Accordion(visible=mode != "ask"),
        )

    def choose_seed(is_random, seed):
        if is_random:
            return uuid.uuid4().int % 1_000_000
        return seed

    def follow(mode, files, image):
        """What was generated is the next edit's source."""
        if mode in ("generate", "edit"):
            return [image]
        return files

    def use_generated(mode, files, generated, event: gr.SelectData):
        """A click on a generated image makes it a source."""
        sources = add_source(mode, files, generated[event.index][0])
        return ("edit" if mode == "generate" else mode), sources

    def use_painting(mode, files, painting):
        image = painting["composite"]
        with errors_shown():
            if image is None or image.getcolors(1):  # all one color
                raise ValueError("the sheet is empty: paint something.")
        return add_source(mode, files, image)

    def use_example(number):
        name, words, scenes = examples[number]
        return name, words, [render(scene) for scene in scenes]

    thumbs = {
        "columns": 6, "height": 150, "fit_columns": False, "allow_preview": False,
        "format": "png", "type": "filepath", "elem_classes": "thumbs",
    }  # fmt: skip
    brush = None
    if is_toy:
        palette = ["#{:02x}{:02x}{:02x}".format(*color) for color in COLORS.values()]
        brush = gr.Brush(default_size=40, colors=palette, color_mode="fixed")
    # Every hour uploads older than a day are deleted.
    options = {"analytics_enabled": False, "delete_cache": (3600, 86_400)}
    with gr.Blocks(title="MetaQuery", **options) as page:
        gr.Markdown(f"# MetaQuery\n{line}")
        with gr.Row(elem_id="columns"):
            with gr.Column():
                modes = list(BUTTONS)
                mode = gr.Radio(modes, value=modes[0], label="Mode", show_label=False)
                prompt = gr.Textbox(examples[0][1], label="Prompt")
                with gr.Group(visible=False) as sources:
                    kinds = ["image"]
                    files = gr.Gallery(label="Sources", file_types=kinds, **thumbs)
                    with gr.Accordion("Paint one", open=False) as painting:
                        size = (256, 256)
                        sheet = gr.Paint(
                            type="pil", image_mode="RGB", canvas_size=size, brush=brush
                        )
                        paint = gr.Button("Use this painting")
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Stop", min_width=80)

            with gr.Column(elem_id="result"):
                with gr.Tabs() as tabs:
                    with gr.Tab("Image", id=0):
                        shown = gr.Image(
                            label="Image", show_label=False, height=400, format="png",
                            type="filepath", interactive=False, elem_id="shown",
                        )  # fmt: skip
                        text = gr.Textbox(label="Drawn as", interactive=False)
                    with gr.Tab("Inside", id=1) as tab:
                        maps = gr.HTML(label="Inside")
                label = "Generated before: click to use"
                generated = gr.Gallery(label=label, interactive=False, **thumbs)

            with gr.Column():
                with gr.Accordion("Settings", open=False) as folded:
                    with gr.Row():
                        is_random = gr.Checkbox(True, label="Random seed")
                        seed = gr.Number(args.seed, label="Seed", precision=0)
                        n = args.num_images
                        number = gr.Slider(1, 24, n, step=1, label="Images")
                    guidance = gr.Slider(0, 20, args.guidance, label="Guidance")
                    label, g_img = "Image guidance", args.image_guidance
                    by_image = gr.Slider(0, 20, g_img, label=label, visible=False)
                    most = max(100, args.steps)
                    steps = gr.Slider(1, most, args.steps, step=1, label="Steps")
                    negative = gr.Textbox(args.negative_prompt, label="Negative prompt")
                chips = [[f"{name}: {line}".strip(": ")] for name, line, _ in examples]
                chosen = gr.Dataset(components=[prompt], samples=chips, type="index")
                if details:
                    with gr.Accordion("What it knows", open=False):
                        gr.Markdown(details)

        request = [mode, prompt, files]
        numbers = [negative, guidance, by_image, steps, seed, number]
        queued = {"concurrency_limit": 1, "concurrency_id": "model"}
        # Only run and inside are the page's API.
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        start = [button.click, prompt.submit]
        gr.on(start, lambda: gr.Tabs(selected=0), None, tabs, **hidden)
        chosen_seed = gr.on(start, choose_seed, [is_random, seed], seed, **hidden)
        outputs = [shown, text, generated]
        inputs = [*request, *numbers, generated]
        queued_run = {"show_progress_on": text} | queued
        running = chosen_seed.then(run, inputs, outputs, **queued_run)
        running.success(follow, [mode, files, shown], files, **hidden)
        stop.click(None, cancels=running, **hidden)
        tab.select(inside, request, maps, **queued)
        changes = [prompt, sources, button, by_image, folded]
        mode.change(adapt, mode, changes, **hidden)
        click = [mode, files]
        generated.select(use_generated, [*click, generated], click, **hidden)
        painting.expand(None, js=TAKE_BRUSH, **hidden)
        paint.click(use_painting, [*click, sheet], files, **hidden)
        chosen.click(use_example, chosen, request, **hidden)
    return page


def parse_arguments():
    """The flags of the command; exits if they are wrong or gradio is missing."""
    parser = cli.open_parser(__doc__)
    port = cli.bounded(int, 1, 65_535)
    parser.add_argument("--port", type=port, help="(the first free one from 7860)")
    add_generation_options(parser)
    args = parser.parse_args()
    if args.num_images > 24:
        cli.fail(f"--num-images is {args.num_images}: the page takes at most 24.")
    if not find_spec("gradio"):
        cli.fail("the page needs gradio: pip install gradio.")
    return args


def main():
    args = parse_arguments()
    with cli.errors_in_one_line():
        page = make_page(load_model(args, exact=True), args)
    from gradio.themes import Default

    theme = Default(font="system-ui", font_mono="monospace")  # fonts that are at hand
    options = {"prevent_thread_lock": True, "quiet": True, "css": CSS, "theme": theme}
    try:
        _, url, _ = page.launch(server_port=args.port, **options)
    except OSError:
        cli.fail(f"no port {args.port or ''} is free: choose another --port.")
    print(f"open {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
