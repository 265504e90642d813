"""Draw with MetaQuery in the browser: what sample.py does, on a page.

pip install gradio && python app.py        draws with weights/tiny
python app.py --checkpoint runs/instruct   any model; the drawing flags set where the sliders start
"""

import argparse
import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from data import command_line
from toy.vocabulary import FILE, unknown_words

BUTTONS = {"draw": "Draw", "edit": "Edit", "reconstruct": "Reconstruct"}  # for each mode
BUTTONS |= {"subjects": "Draw these subjects", "ask": "Ask"}
CSS = "#out img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}"
CSS += ".thumbs {border: 1px solid #e4e4e7 !important} .thumbs .grid-wrap {margin-top: 26px}"


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.begin(parser)
    parser.add_argument("--port", type=int, help="of the page (the first free one from 7860)")
    command_line.add_drawing_options(parser)
    args = parser.parse_args()
    if not find_spec("gradio"):
        command_line.stop("the page needs gradio: pip install gradio.")
    command_line.check_bounds(vars(args), command_line.DRAWING_BOUNDS | {"port": (1, 65535)})
    return args


def make_page(model, args):
    """The page of a model, gradio Blocks; args are the flags."""
    import gradio as gr

    import notebooks.page as parts

    vocabulary = Path(model.config.mllm) / FILE  # only the toy world's MLLM has one
    card = Path(args.checkpoint or command_line.WEIGHTS / args.size) / "README.md"

    @contextmanager
    def errors_shown():
        try:
            yield
        except ValueError as error:  # InputError is one; without the folder of uploads
            raise gr.Error(re.sub(r"/\S*/", "", str(error)), print_exception=False) from None

    def read(mode, prompt, files):
        prompt, images = parts.read_request(mode, prompt or "", [path for path, _ in files or ()])
        if vocabulary.exists() and (unknown := unknown_words([prompt], vocabulary)):
            gr.Warning(f"the tiny model never saw: {', '.join(unknown)}.")
        return prompt, images

    def run(mode, prompt, files, guidance, image_guidance, steps, seed, drawn):
        """Draw or answer: yields (picture, answer, all that was drawn)."""
        set_here = dict(guidance=guidance, image_guidance=image_guidance, steps=steps, seed=seed)
        with errors_shown():
            prompt, images = read(mode, prompt, files)
            if mode == "ask":
                text = parts.WORKER.submit(model.answer, prompt, images).result()
                yield gr.skip(), gr.Textbox(text, visible=True), gr.skip()
                return
            settings = argparse.Namespace(**vars(args) | set_here)
            for pictures, done in parts.film(model, prompt, images, settings):
                all_drawn = pictures + (drawn or [])[:23] if done else gr.skip()
                yield pictures[0], gr.Textbox(visible=False), all_drawn

    def inside(mode, prompt, files):
        with errors_shown():
            request = read(mode, prompt, files)
            return parts.WORKER.submit(parts.look_inside, model, *request).result()

    def adapt(mode):
        """Show what a mode takes."""
        takes_text, takes_pictures = mode != "reconstruct", mode != "draw"
        return gr.Textbox(visible=takes_text), gr.Group(visible=takes_pictures), BUTTONS[mode]

    def use_drawn(mode, files, drawn, event: gr.SelectData):
        """A click on a drawn picture makes it a source."""
        sources = parts.more_sources(mode, files, drawn[event.index])
        return "edit" if mode == "draw" else mode, sources

    small = {"height": 150, "columns": 6, "fit_columns": False, "allow_preview": False}
    small |= {"format": "png", "type": "filepath", "elem_classes": "thumbs"}
    with gr.Blocks(title="MetaQuery", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# MetaQuery\nLearnable queries, read by a frozen multimodal LLM, draw.")
        with gr.Row():
            with gr.Column():
                mode = gr.Radio(list(BUTTONS), value="draw", show_label=False, container=False)
                prompt = gr.Textbox(parts.EXAMPLES[0][1], label="Prompt")
                with gr.Group(visible=False) as sources:
                    files = gr.Gallery(label="Source pictures", **small)
                    with gr.Accordion("Paint one", open=False):
                        paper = gr.Paint(type="pil", image_mode="RGB", canvas_size=(256, 256))
                        paint = gr.Button("Use this painting")
                button = gr.Button("Draw", variant="primary")
                with gr.Row():
                    guidance = gr.Slider(0, 10, args.guidance, label="Guidance")
                    by_image = gr.Slider(0, 10, args.image_guidance, label="Image guidance")
                with gr.Row():
                    steps = gr.Slider(1, max(100, args.steps), args.steps, step=1, label="Steps")
                    seed = gr.Slider(0, max(999, args.seed), args.seed, step=1, label="Seed")
                chips = [[f"{mode}: {prompt}".strip(": ")] for mode, prompt, _ in parts.EXAMPLES]
                examples = gr.Dataset(components=[prompt], samples=chips, type="index")
            with gr.Column():
                with gr.Tabs() as tabs:
                    with gr.Tab("Picture", id=0):
                        shown = gr.Image(show_label=False, height=420, format="png", elem_id="out")
                        answer = gr.Textbox(label="Answer", visible=False, elem_id="answer")
                    with gr.Tab("Inside", id=1) as tab:
                        maps = gr.HTML()
                drawn = gr.Gallery(label="Drawn before: click to use", interactive=False, **small)
        if card.exists():
            with gr.Accordion("What it knows", open=False):
                gr.Markdown(card.read_text().partition("## What it knows")[2].partition("\n## ")[0])
        request = [mode, prompt, files]
        inputs = [*request, guidance, by_image, steps, seed, drawn]
        queued = {"concurrency_limit": 1, "concurrency_id": "model"}
        start = [button.click, prompt.submit]
        gr.on(start, lambda: gr.Tabs(selected=0), None, tabs)
        gr.on(start, run, inputs, [shown, answer, drawn], show_progress_on=shown, **queued)
        tab.select(inside, request, maps, **queued)
        mode.change(adapt, mode, [prompt, sources, button])
        drawn.select(use_drawn, [mode, files, drawn], [mode, files])
        paint.click(parts.use_painting, [mode, files, paper], files)
        examples.click(parts.example, examples, request)
    return page


def main():
    args = parse_arguments()
    with command_line.errors_in_one_line():
        page = make_page(command_line.load_model(args), args)
    from gradio.themes import Default

    look = {"css": CSS, "theme": Default(font="system-ui", font_mono="monospace")}  # fonts at hand
    try:
        _, url, _ = page.launch(server_port=args.port, prevent_thread_lock=True, quiet=True, **look)
    except OSError:
        command_line.stop(f"no port {args.port or ''} is free: choose another --port.")
    print(f"open {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
