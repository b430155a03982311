"""The drills' pictures of figures over time."""

from xml.etree import ElementTree

from lab.drills.lines import Line, Panel, picture


def test_figures_over_time_are_one_picture_that_has_every_line_and_what_happened_when() -> None:
    lines = [Line("with & without", [(0.0, 1.0), (60.0, 3.0)], own=True), Line("flat", [(0.0, 0.0), (60.0, 0.0)])]
    drawn = ElementTree.fromstring(picture([Panel("answered", lines)], band=(10.0, 20.0, "surge")))
    assert len(drawn.findall(".//{*}polyline")) == 2
    assert {"answered", "with & without", "flat", "surge", "60 s"} <= {text.text for text in drawn.iter()}
