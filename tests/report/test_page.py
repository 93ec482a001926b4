"""The page is one file: nothing is loaded, everything is escaped, pictures follow light and dark."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kl_plugins.report import page
from kl_plugins.report.page import INK, Section, Table, compact, fixed, picture, render, with_interval, write

HOSTILE = """<script>alert('x')</script> "quoted" & $x_1$"""


class Checked(HTMLParser):
    """Every element is closed by its own end; ids and text are collected."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def drawing(name):
    def draw(axis):
        axis.plot([0, 1], [0, 1], color=INK["blue"], label=HOSTILE)
        axis.fill_between([0, 1], [0, 1], [1, 2], color=INK["orange"], alpha=0.2)
        axis.set_title(HOSTILE)
        axis.grid()

    return picture(draw, name=name, alt=HOSTILE, caption=HOSTILE)


@pytest.fixture(scope="module")
def text():
    table = Table(columns=("run", HOSTILE), rows=[(HOSTILE, "1"), ("b", HOSTILE)], caption=HOSTILE)
    section = Section(
        title=HOSTILE,
        text=[HOSTILE],
        items=[HOSTILE],
        legend=[(HOSTILE, "blue", "solid")],
        pictures=[drawing("one"), drawing("two")],
        tables=[table],
    )
    return render(title=HOSTILE, lead=[HOSTILE], sections=[section, Section(title="empty")], notices=[HOSTILE])


def test_everything_is_escaped_and_well_formed(text):
    found = Checked(text)
    assert "script" not in found.tags
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert found.text.count(HOSTILE) >= 14  # with the titles of the two pictures
    assert len(found.ids) == len(set(found.ids))


def test_nothing_is_loaded_from_anywhere(text):
    found = Checked(text)
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(link.startswith("#") for link in links)
    assert all(link[1:] in found.ids for link in links)
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    assert "default-src 'none'" in text
    references = set(re.findall(r"url\(#([^)]+)\)", text))
    assert references <= set(found.ids)


def test_pictures_take_the_colours_of_the_page(text):
    assert not any(ink in text.lower() for ink in INK.values())
    assert "stroke: var(--blue)" in text
    assert "fill: var(--text)" in text
    for name, (light, dark) in page.COLOURS.items():
        assert f"--{name}:{light};" in text
        assert f"--{name}:{dark};" in text.split("prefers-color-scheme:dark")[1]
    assert 'role="img"' in text
    assert "viewBox" in text
    assert not re.search(r'<svg[^>]* width="', text)
    assert "fill: #ffffff" not in text  # transparent


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(name, scheme):
    """WCAG's, of a colour and the page: 0 is light, 1 dark."""
    both = sorted(luminance(page.COLOURS[colour][scheme]) for colour in ("page", name))
    return (both[1] + 0.05) / (both[0] + 0.05)


def test_colours_can_be_read_on_the_page():
    """By WCAG's contrast: 4.5 for text, 3 for what is drawn."""
    bounds = dict.fromkeys(page.SERIES, 3) | {"text": 4.5, "soft": 4.5}
    found = {(name, scheme): contrast(name, scheme) for name in bounds for scheme in (0, 1)}
    assert {case: value for case, value in found.items() if value < bounds[case[0]]} == {}
    assert max(contrast("grid", scheme) for scheme in (0, 1)) < 3  # so that a pale colour would be noticed


def test_numbers():
    assert [compact(x) for x in (None, float("nan"), 0.0, 0.012345, 1234.5, 1e9)] == [
        "–",
        "–",
        "0",
        "0.0123",
        "1,234",
        "1e+09",
    ]
    assert with_interval({"value": 1.0, "low": 0.5, "high": 2.0}, fixed) == "1.00 [0.50, 2.00]"
    assert with_interval({"value": None, "low": None, "high": None}) == "–"


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "page.html"
    write(path, "before")
    with pytest.raises(TypeError):
        write(path, None)
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_the_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/kl-plugins", "report", "a b", "--out", "x.html"])
    assert page.command_line() == "kl-plugins report 'a b' --out x.html"
    rows = dict(page.provenance(seed="3").rows)
    assert rows["seed"] == "3"
    assert "torch" in rows["versions"]
