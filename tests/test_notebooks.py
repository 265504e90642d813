"""Every notebook runs from top to bottom, and is written as the others are."""

import ast
import json
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
    pytest.importorskip("matplotlib")
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
    for solution in re.findall(r"```python\n(.*?)```", last, re.DOTALL):
        ast.parse(re.sub(r"^!.*$", "", solution, flags=re.MULTILINE))


def test_results_are_drawn_and_where_there_are_none_the_command_is_told(
    tmp_path, monkeypatch, capsys
):
    show = pytest.importorskip("notebooks.show")
    drawn = []
    monkeypatch.setattr(show, "RESULTS", tmp_path)
    monkeypatch.setattr(show.plt, "show", lambda: drawn.append(show.plt.gcf()))
    show.show_results("T3", ["dense"])
    assert "python -m extras.tables T3" in capsys.readouterr().out and not drawn
    arms = {"one": {"mean": {"dense": 0.5}, "spread": {"dense": 0.1}}}
    arms["two"] = {"mean": {"dense": 0.75}, "spread": {"dense": 0.0}}
    result = {
        "seeds": [0, 1, 2],
        "settings": {"steps": 600, "batch_size": 16, "lr": 2e-4, "limit": 50},
        "arms": arms,
    }
    (tmp_path / "T3.json").write_text(json.dumps(result))
    show.show_results("T3", ["dense"])
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert heights == [0.5, 0.75]
    told = "T3 --seeds 3 --steps 600 --batch-size 16 --lr 0.0002 --limit 50"
    assert told in capsys.readouterr().out
