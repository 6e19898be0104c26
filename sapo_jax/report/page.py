"""The HTML of a run's report: its style sheet, and functions from values to markup.

Every string that reaches the page goes through `text` or `visible`: completions are written by a
model in training and may hold anything. The page has no scripts, and its content policy lets a
browser load nothing from anywhere.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sapo_jax.report.run_words import COLOURS, PANELS, SECTIONS, TERMS

LIMIT = 4000  # characters of a prompt or completion that are shown
SIGNS = {"\n": "↵", "\t": "⇥"}
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode categories that have no shape

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #24292f;
  --soft: #5c6570; --grid: #dfe3e8; --chip: #eef1f4; --blue: #0072b2; --orange: #d55e00;
  --green: #009e73; --purple: #b05f91; --amber: #e69f00; --sky: #56b4e9; --grey: #8c959f;
  --right: #e8f2f9; --wrong: #fcf0e8; --sans: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; --mono: ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --card: #181d24; --ink: #e3e8ee;
  --soft: #97a3b0; --grid: #2d343d; --chip: #232a33; --blue: #4fb0e8; --orange: #f08a4b;
  --green: #2fc79a; --purple: #dc94c0; --amber: #f0b840; --sky: #86cbf3; --grey: #818b96;
  --right: #15283a; --wrong: #33221a; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--sans); }
main, header > div { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { background: var(--card); border-bottom: 1px solid var(--grid); padding: 40px 0 32px; }
header .kind { color: var(--blue); font-weight: 600; font-size: 13px; letter-spacing: .04em;
  text-transform: uppercase; margin: 0; }
h1 { font-size: 34px; line-height: 1.2; margin: 2px 0 8px; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
header .lead { color: var(--soft); max-width: 76ch; margin: 0 0 16px; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 26px; padding: 0; list-style: none; }
.chips li { background: var(--chip); border-radius: 99px; padding: 2px 12px; font-size: 13px; }
.chips b { font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 14px; }
.tile { border: 1px solid var(--grid); border-radius: 12px; padding: 13px 16px 12px; }
.tile:first-child { border-color: var(--blue); box-shadow: inset 0 0 0 1px var(--blue); }
.tile .label, .tile .note { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 23px; font-weight: 650; letter-spacing: -.01em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile .value small { color: var(--soft); font-size: 16px; font-weight: 500; }
.warning { border-left: 4px solid var(--orange); background: var(--wrong); padding: 10px 16px;
  border-radius: 0 8px 8px 0; margin: 22px 0 0; font-size: 14px; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page);
  border-bottom: 1px solid var(--grid); }
nav div { max-width: 1180px; margin: 0 auto; padding: 9px 24px; display: flex; gap: 22px;
  overflow-x: auto; white-space: nowrap; font-size: 14px; }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--blue); }
section { margin: 34px 0 46px; }
h2 { font-size: 22px; margin: 0 0 4px; letter-spacing: -.01em; }
.intro { color: var(--soft); margin: 0 0 16px; max-width: 86ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr));
  gap: 18px; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 15px 18px 16px; margin: 0; min-width: 0; }
.card.wide { grid-column: 1 / -1; }
.card h3 { margin: 0 0 8px; font-size: 15px; }
.card figcaption { color: var(--soft); font-size: 13.5px; line-height: 1.45; margin-top: 8px; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; }
.card.wide .plot svg { min-width: 680px; }
svg text { font-family: var(--sans) !important; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.bar { background: var(--chip); border-radius: 4px; height: 12px; margin-top: 5px;
  min-width: 120px; }
.bar i { display: block; height: 100%; border-radius: 4px; min-width: 2px; }
.scroll { overflow-x: auto; }
.samples { table-layout: fixed; min-width: 860px; }
.samples td, .samples th { padding: 9px 10px; }
.samples .right { background: var(--right); box-shadow: inset 4px 0 var(--blue); }
.samples .wrong { background: var(--wrong); box-shadow: inset 4px 0 var(--orange); }
.samples .mark { white-space: nowrap; padding-left: 16px; font-weight: 600; }
.right .mark b { color: var(--blue); } .wrong .mark b { color: var(--orange); }
.samples small { display: block; color: var(--soft); font-weight: 400; white-space: normal; }
.written { font: 12.5px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 15em; overflow: auto; unicode-bidi: isolate; }
.hidden { color: var(--purple); font-size: .9em; opacity: .9; user-select: none; }
.tree, .tree details { font: 13px/1.7 var(--mono); }
.tree details, .tree div { padding-left: 20px; overflow-wrap: anywhere; }
.tree > details, .tree > div { padding-left: 0; }
.tree summary { cursor: pointer; font-weight: 600; margin-left: -2px; }
.tree div span { color: var(--blue); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 0;
  font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
.glossary { margin: 26px 0 -8px; } .glossary summary { cursor: pointer; font-weight: 600; }
footer { color: var(--soft); font-size: 13px; padding: 0 0 40px; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
"""


def text(value: Any) -> str:
    """Any value as HTML text that is safe in content and in quoted attributes."""
    return html.escape("".join(_shaped(c) or f"\\u{ord(c):04x}" for c in str(value)))


def visible(value: Any) -> str:
    """Untrusted text as HTML in which every character without a shape of its own can be seen."""
    value = str(value)
    parts = []
    for character in value[:LIMIT]:
        shown = _shaped(character)
        parts.append(html.escape(shown) if shown else _hidden(character))
    if len(value) > LIMIT:
        parts.append(f'<span class="hidden">… {len(value) - LIMIT:,} more characters</span>')
    return "".join(parts)


def _shaped(character: str) -> str:
    return "" if unicodedata.category(character) in HIDDEN else character


def _hidden(character: str) -> str:
    shown = SIGNS.get(character) or f"‹U+{ord(character):04X}›"
    return f'<span class="hidden">{shown}</span>' + (character if character in SIGNS else "")


def tile(label: str, first: str | None, last: str, note: str) -> str:
    """One number of the header; ``first`` is where it began, if it moved."""
    begin = f"<small>{text(first)} → </small>" if first is not None else ""
    return (
        f'<div class="tile"><div class="label">{text(label)}</div>'
        f'<div class="value">{begin}{text(last)}</div><div class="note">{text(note)}</div></div>'
    )


def header(
    kind: str, name: str, lead: str, chips: Mapping[str, Any], tiles: Iterable[str], warning: str
) -> str:
    """What was run and the numbers that it reached."""
    items = "".join(f"<li>{text(key)} <b>{text(value)}</b></li>" for key, value in chips.items())
    return (
        f'<header><div><p class="kind">{text(kind)}</p><h1>{text(name)}</h1>'
        f'<p class="lead">{text(lead)}</p>'
        + (f'<ul class="chips">{items}</ul>' if items else "")
        + f'<div class="tiles">{"".join(tiles)}</div>'
        + (f'<p class="warning" role="note">{text(warning)}</p>' if warning else "")
        + "</div></header>"
    )


def _svg(slug: str, figure: Figure, title: str) -> str:
    """Inline SVG of a figure, with ids of its own and the page's colours and fonts."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": slug, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{slug}-", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace('role="img"', f'role="img" aria-label="{text(title)}"', 1)


def figure(slug: str, drawing: Figure, *, wide: bool, panels: Mapping = PANELS) -> str:
    """A plot with its title above and what to look for below."""
    title, caption = panels[slug]
    return (
        f'<figure class="card{" wide" if wide else ""}" id="{slug}"><h3>{text(title)}</h3>'
        f'<div class="plot">{_svg(slug, drawing, title)}</div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _glossary(terms: Mapping[str, str]) -> str:
    """Words that the plots use, folded away."""
    rows = "".join(f"<dt>{text(word)}</dt><dd>{text(said)}</dd>" for word, said in terms.items())
    return (
        f'<details class="glossary"><summary>What the words mean</summary><dl>{rows}</dl></details>'
    )


def grid(cards: Iterable[str]) -> str:
    """Cards side by side where there is room."""
    return f'<div class="grid">{"".join(cards)}</div>'


def shares(rows: Sequence[tuple[str, str, float, float]]) -> str:
    """Where the time went; rows of (phase, colour, seconds, share of the total)."""
    body = "".join(
        f'<tr><td>{text(phase)}</td><td class="number">{seconds:,.1f}</td>'
        f'<td class="number">{share:.1%}</td><td style="width:50%"><div class="bar">'
        f'<i style="width:{100 * share:.1f}%;background:var(--{colour})"></i></div></td></tr>'
        for phase, colour, seconds, share in rows
    )
    return (
        '<div class="card wide" id="shares"><table><thead><tr><th>Phase</th>'
        '<th class="number">Seconds</th><th class="number">Share</th><th></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """Rows of words and numbers, the first of each a name."""

    def line(tag: str, cells: Sequence[str]) -> str:
        name, *numbers = map(text, cells)
        rest = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in numbers)
        return f"<tr><{tag}>{name}</{tag}>{rest}</tr>"

    return (
        f'<figure class="card wide"><h3>{text(title)}</h3><div class="scroll"><table><thead>'
        f"{line('th', columns)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody>"
        f"</table></div><figcaption>{text(note)}</figcaption></figure>"
    )


def samples(rows: Iterable[tuple[bool, Mapping[str, Any]]]) -> str:
    """A table of completions, each with whether it counts as right."""
    return (
        '<div class="card wide scroll"><table class="samples"><colgroup><col style="width:128px">'
        '<col style="width:28%"><col><col style="width:15%"></colgroup><thead><tr><th>Verdict</th>'
        "<th>Problem</th><th>Completion</th><th>Expected answer</th></tr></thead>"
        f"<tbody>{''.join(_sample(right, row) for right, row in rows)}</tbody></table></div>"
    )


def _sample(right: bool, row: Mapping[str, Any]) -> str:
    numbers = [(name, row.get(name)) for name in ("reward", "advantage")]
    numbers = [(n, v) for n, v in numbers if isinstance(v, int | float) and isfinite(v)]
    notes = [f"{name} {value:.3g}".replace("-", "−") for name, value in numbers]
    notes += ["cut at the length limit"] if row.get("finished") == 1 else []
    where = f"iteration {row.get('iteration')}, problem {row.get('prompt_id')}, "
    where += f"sample {row.get('sample_index')}"
    cells = "".join(
        f'<td><div class="written">{visible("" if row.get(key) is None else row[key])}</div>{more}'
        for key, more in (
            ("prompt", f"<small>{text(where)}</small></td>"),
            ("completion", "</td>"),
            ("answer", "</td>"),
        )
    )
    verdict, mark = ("right", "✓ right") if right else ("wrong", "✗ wrong")
    small = "".join(f"<small>{text(note)}</small>" for note in notes)
    return f'<tr class="{verdict}"><td class="mark"><b>{mark}</b>{small}</td>{cells}</tr>'


def tree(config: Mapping[str, Any]) -> str:
    """A nested mapping as folded lists."""
    return f'<div class="card tree">{_branches(config)}</div>'


def _branches(node: Mapping[str, Any]) -> str:
    return "".join(
        f"<details><summary>{text(key)}</summary>{_branches(value)}</details>"
        if isinstance(value, Mapping) and value
        else f"<div>{text(key)}: <span>{text(value)}</span></div>"
        for key, value in node.items()
    )


def document(
    title: str,
    head: str,
    body: Mapping[str, str],
    *,
    sections: Mapping = SECTIONS,
    terms: Mapping[str, str] = TERMS,
) -> str:
    """The whole page; ``body`` is slug -> markup, for the sections that have something to show."""
    links = "".join(f'<a href="#{slug}">{text(sections[slug][0])}</a>' for slug in body)
    chapters = "\n".join(
        f'<section id="{slug}"><h2>{text(sections[slug][0])}</h2>'
        f'<p class="intro">{text(sections[slug][1])}</p>{markup}</section>'
        for slug, markup in body.items()
    )
    words = _glossary(terms) if body else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>{head}\n"
        f"<nav><div>{links}</div></nav>\n<main>{words}{chapters}</main>\n</body>\n</html>\n"
    )
