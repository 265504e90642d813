"""Every notebook runs from top to bottom, and is written as the others are."""

import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    nbclient = pytest.importorskip("nbclient")
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(read(path), timeout=600, resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_short_cells_outputs_and_three_exercises(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert cell.execution_count, "its outputs are committed"
        assert not [out for out in cell.outputs if out.output_type == "error"]
    last = read(path).cells[-1].source
    assert len(re.findall("<details>", last)) == 3
