"""The diagram in the README is what its code draws."""

from xml.etree import ElementTree

from conftest import ROOT

from notebooks.diagram import draw


def test_the_diagram_is_what_its_code_draws():
    drawn = draw()
    ElementTree.fromstring(drawn)
    assert (ROOT / "notebooks" / "method.svg").read_text(encoding="utf-8") == drawn
