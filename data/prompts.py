"""Files of prompts: one a line, .jsonl lines or a .json list, with the picture files they name."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

from data.command_line import stop
from data.pictures import open_picture


@dataclass
class Job:
    """One thing to draw or to answer: a prompt and picture files, or why it cannot be read."""

    prompt: str = ""
    files: list = field(default_factory=list)
    error: str = ""
    images: list = field(default_factory=list)  # the files' pictures, PIL

    def __post_init__(self):
        self.prompt = " ".join(self.prompt.split())  # no-break spaces too
        if self.prompt != self.prompt.encode(errors="ignore").decode():
            self.error = "the prompt is not valid Unicode text: correct it."

    def open_images(self):
        """Open the picture files; a file that cannot be opened becomes the job's error."""
        from metaquery import MAX_PICTURES

        if len(self.files) > MAX_PICTURES:
            self.error = f"{len(self.files)} pictures: give at most {MAX_PICTURES}."
        if not self.error:
            try:
                self.images = [open_picture(path) for path in self.files]
            except ValueError as error:
                self.error = str(error)
        return self


def read_jobs(path):
    """The `Job` of each row of a prompts file; a row that cannot be read has its error set."""
    kind = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # without a byte-order mark
        rows = json.loads(text) if kind == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        stop(f"cannot read --prompts {path} ({error}): give a text file with one prompt a line.")
    if not isinstance(rows, list):
        stop(f"--prompts {path} is not a JSON list: write a list of prompts, or a .jsonl file.")
    jobs = []
    for number, row in enumerate(rows, 1):
        place = f"{path} {'item' if kind == '.json' else 'line'} {number}"
        if kind == ".json":
            jobs.append(Job(row) if isinstance(row, str) else job_of(row, place, Path(path)))
        elif row.strip():
            jobs.append(read_json_line(row, place, Path(path)) if kind == ".jsonl" else Job(row))
    if not jobs:
        stop(f"--prompts {path} is empty: write one prompt a line.")
    return jobs


def read_json_line(line, place, path):
    """The `Job` of a line of a .jsonl file."""
    try:
        return job_of(json.loads(line), place, path)
    except ValueError:
        return Job(error=f"{place} is not JSON: correct that line.")


def job_of(row, place, path):
    """The `Job` of {"prompt": text, "images": [file, ...]}; files are beside `path`, or here."""
    expected = 'give a JSON object with a "prompt" text and "images" files, or one of them'
    for key in set(row) - {"prompt", "images"} if isinstance(row, dict) else ():
        if meant := difflib.get_close_matches(key, ("prompt", "images")):
            return Job(error=f'{place} has "{key}": write "{meant[0]}".')
    if not isinstance(row, dict) or not row.keys() & {"prompt", "images"}:
        return Job(error=f"{place}: {expected}.")
    prompt, images = row.get("prompt", ""), row.get("images", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(prompt, str) or not isinstance(images, list):
        return Job(error=f"{place}: {expected}.")
    if not all(isinstance(image, str) for image in images):
        return Job(error=f"{place}: {expected}.")
    beside = [path.parent / image for image in images]
    return Job(prompt, [b if b.exists() else i for b, i in zip(beside, images, strict=True)])
