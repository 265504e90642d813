"""The toy benchmark, as its user runs it."""

import json

import commands
from PIL import Image

from toy.tasks import SIX_KINDS

call = commands.call


def test_it_prints_a_table_and_writes_it(call, tmp_path):
    flags = ["--limit", 2, "--steps", 3, "--dtype", "float32", "--json", "t.json", "--out", "t.png"]
    code, out, _ = call("benchmarks.toy", *flags)
    assert code == 0 and out.startswith("computing in float32, as --dtype says\n")
    table = json.loads((tmp_path / "t.json").read_text())
    assert set(SIX_KINDS) < set(table["scores"]) and "six-kind overall" in table["scores"]
    assert table["steps"] == 3 and table["dtype"] == "float32"
    assert all(kind in out for kind in table["scores"])
    assert Image.open(tmp_path / "t.png").width > 64 * 10
