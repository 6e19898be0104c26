"""From values to a self-contained page: Jinja2 templates in which no text can become markup.

Completions are written by a model in training and may hold anything. Every value is escaped, and
its characters without a shape are spelled out; only `visible` and `svg` give markup. The page has
no scripts, and its content policy lets a browser load nothing from anywhere.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
import matplotlib
from absl import logging
from etils import epath
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from sapo_jax.report import style
from sapo_jax.report.style import Panel
from sapo_jax.training.files import check_file

LIMIT = 4000  # characters of a prompt or completion that are shown
SIGNS = {"\n": "↵", "\t": "⇥"}
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode categories that have no shape


class Tile(NamedTuple):
    """One number of the header; ``first`` is where it began, if it moved."""

    label: str
    value: str
    note: str = ""
    first: str | None = None


class Plot(NamedTuple):
    """A panel as SVG, and a wide one once more as a phone shows it."""

    title: str
    svg: Markup
    phone: Markup | None


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN


def spelled(value: Any) -> Any:
    """What is not markup as text with its hidden characters spelled out, such as \\u202e."""
    if isinstance(value, Markup | jinja2.Undefined):
        return value
    text = str(value).replace("\n", " ")  # the prose of templates has line ends
    return "".join(f"\\u{ord(c):04x}" if _is_hidden(c) else c for c in text)


def visible(value: Any) -> Markup:
    """Untrusted text, as much as is shown, with signs for its hidden characters."""
    value = "" if value is None else str(value)
    parts = []
    for character in value[:LIMIT]:
        if _is_hidden(character):
            sign = SIGNS.get(character, f"‹U+{ord(character):04X}›")
            parts.append(Markup('<span class="hidden">{}</span>').format(sign))
            parts.append(character if character in SIGNS else "")
        else:
            parts.append(escape(character))
    if len(value) > LIMIT:
        more = f"… {len(value) - LIMIT:,} more characters"
        parts.append(Markup('<span class="hidden">{}</span>').format(more))
    return Markup("").join(parts)


def svg(slug: str, figure: Figure, title: str) -> Markup:
    """Inline SVG of a figure, with ids of its own and the page's colours and fonts."""
    buffer = io.StringIO()
    with matplotlib.rc_context(style.STYLE | {"svg.hashsalt": slug, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', drawn)
    drawn = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{slug}-", drawn)
    for name, colour in style.COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return Markup(drawn.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1))


def plots(panels: Mapping[str, Panel], *data: Any) -> dict[str, Plot | None]:
    """Every panel as it stands in the page; None where there is nothing to draw, or it fails."""

    def draw(slug: str, panel: Panel) -> Plot | None:
        if not (figure := style.figure_of(panel, *data)):
            return None
        phone = style.figure_of(panel, *data, width=style.NARROW) if panel.wide else None
        phone = phone and svg(f"{slug}-phone", phone, panel.title)
        return Plot(panel.title, svg(slug, figure, panel.title), phone)

    drawn: dict[str, Plot | None] = dict.fromkeys(panels)
    for slug, panel in panels.items():
        try:
            drawn[slug] = draw(slug, panel)
        except Exception as error:  # a page is worth more than any of its plots
            logging.warning("No plot %r: %s: %s", panel.title, type(error).__name__, error)
    return drawn


def is_page(content: bytes) -> bool:
    """Whether a file is a page of ours, of any version: their content policy is the same."""
    return b"default-src 'none'" in content


def write(path: epath.Path, template: str, **values: Any) -> epath.Path:
    """Write a page; the same values give the same bytes.

    Args:
        path: Of the page.
        template: ``run``, ``sweep`` or ``gradlab``.
        **values: What the template shows: ``name``, ``chips``, ``tiles``, ``warning``, ``starts``
            (see `training.provenance`), ``plots`` and what its body asks for.
    """
    check_file(path, "", is_page, "a report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapo_jax.report"),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=spelled,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    page = environment.get_template(f"{template}.html.j2").render(**values, sections=[])
    path.write_text(page, encoding="utf-8")
    return path
