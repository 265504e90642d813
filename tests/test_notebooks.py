"""The notebooks run, their solutions too, and every command in their text is one that exists."""

import argparse
import ast
import importlib
import json
import re
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import public_weights
from metaquery import TINY
from notebooks.tiny_parts import make_openuni

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
pytestmark = pytest.mark.usefixtures("handlers_restored")
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
COMMAND = re.compile(r"^!?(?:torchrun .*?(?=\w+\.py)|python (?:-m )?)([\w./]+)(.*)$", re.M)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def solutions(path):
    """The code of the exercises' solutions, in the last cell."""
    return re.findall(r"```python\n(.*?)```", read(path).cells[-1].source, re.S)


def commands(path):
    """(program, flags) of each command in a notebook, in its text or after an exclamation mark."""
    found = []
    for cell in read(path).cells:
        text = cell.source
        if cell.cell_type == "markdown":
            inline = re.findall(r"`((?:python|torchrun) [^`]*)`", text)
            text = "\n".join([*re.findall(r"```(?:bash|python)\n(.*?)```", text, re.S), *inline])
        text = text.replace("\\\n", " ")
        text = re.sub(r'"([^"\n]*)"', lambda quoted: quoted[1].replace(" ", "_"), text)
        for program, flags in COMMAND.findall(text):
            # {flags} stands for flags that the cell puts together: they are tested by running it.
            flags = re.sub(r"2> \S+|\{flags\}", "", flags)
            found.append((program, flags.split()))
    return found


@pytest.mark.slow
@EACH
def test_a_notebook_and_its_solutions_run(path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    notebook = read(path)
    text = notebook.cells[-1].source
    count = len(notebook.cells)
    # Solutions that train do so for two steps.
    notebook.cells.append(nbformat.v4.new_code_cell("STEPS = 2"))
    for code in solutions(path):
        code = re.sub(r"--steps \d+", "--steps 2", code)
        notebook.cells.append(nbformat.v4.new_code_cell(code))

    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    printed = str([cell.outputs for cell in notebook.cells[count:]])
    for promised in re.findall(r"It prints `([^`]*)`", text):
        assert promised in printed


@EACH
def test_a_notebook_is_written_as_the_others(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert cell.execution_count, "its outputs are committed"
        assert not [out for out in cell.outputs if out.output_type == "error"]

    cells = read(path).cells
    for part in ("**Goals.**", "**Time.**", "**Prerequisites.**"):
        assert part in cells[0].source
    whole = "\n".join(cell.source for cell in cells)
    assert "## Summary" in whole and "**Predict, then run" in whole
    assert len(re.findall("<details>", cells[-1].source)) == 3
    for code in solutions(path):
        ast.parse(re.sub(r"^!.*$", "", code, flags=re.M))
    for link in re.findall(r"\]\(([\w./]+)\)", whole):
        assert (path.parent / link).exists(), link


class Parsed(Exception):
    """Raised instead of running a command whose flags are right."""


@EACH
def test_commands_in_a_notebook_exist_and_take_their_flags(path, monkeypatch):
    for program, flags in commands(path):
        check_command(program, flags, monkeypatch)


@pytest.mark.parametrize("flags", ["--zero", "--gradient-checkpointing maybe"])
def test_a_flag_that_is_gone_is_noticed(flags, monkeypatch):
    with pytest.raises(SystemExit):
        check_command("train.py", flags.split(), monkeypatch)


def check_command(program, flags, monkeypatch):
    """Parse the flags as the program does, and stop before it runs."""
    parser_class = argparse.ArgumentParser
    parse = parser_class.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        _, unknown = parse(self, *args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    name = program.removesuffix(".py").replace("/", ".")
    if (ROOT / name.replace(".", "/")).is_dir():
        name += ".__main__"
    monkeypatch.setattr(parser_class, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    with pytest.raises(Parsed):
        importlib.import_module(name).main()
    monkeypatch.undo()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """notebooks.show, with its results in an empty folder; and that folder's T3.json, unwritten."""
    show = pytest.importorskip("notebooks.show")
    monkeypatch.setattr(show, "RESULTS", tmp_path)
    return show, tmp_path / "T3.json"


def test_without_results_the_command_is_printed(table, capsys):
    show, _ = table
    show.show_results("T3", ["dense"])
    assert "python -m extras.tables T3" in capsys.readouterr().out


def test_results_are_printed_with_their_spread_and_shown_as_bars(table, monkeypatch, capsys):
    show, file = table
    shown = []
    monkeypatch.setattr(show.plt, "show", lambda: shown.append(show.plt.gcf()))
    variants = {"one": {"mean": {"dense": 0.5}, "spread": {"dense": 0.1}}}
    variants["two"] = {"mean": {"dense": 0.75}, "spread": {"dense": 0.0}}
    settings = {"steps": 600, "batch_size": 16, "lr": 2e-4, "limit": 50}
    result = {"seeds": [0, 1, 2], "settings": settings, "variants": variants}
    file.write_text(json.dumps(result))

    show.show_results("T3", ["dense"])
    heights = [bar.get_height() for bar in shown[0].axes[0].patches]
    assert heights == [0.5, 0.75]
    printed = capsys.readouterr().out
    assert "T3 --seeds 3 --steps 600 --batch-size 16 --lr 0.0002 --limit 50" in printed
    assert "0.50 ± 0.10" in printed and "0.75 ± 0.00" in printed


def test_the_tiny_openuni_loads_and_takes_an_image(tmp_path):
    make_openuni(tmp_path)
    diffusion = TINY / "diffusion"
    parts = {"mllm": tmp_path / "internvl", "diffusion": diffusion, "vae": diffusion / "vae"}
    model = public_weights.load(tmp_path / "openuni.pth", **parts)
    image = Image.new("RGB", (64, 64), "red")
    cond, _ = model.encode_prompts(["a red star", "a star"])
    other, _ = model.encode_prompts(["a star"], [[image]])
    assert cond.shape == (2, 16, 192) and other.shape == (1, 16, 192)
    assert not torch.equal(cond[1], other[0])
