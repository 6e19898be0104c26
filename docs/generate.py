"""Write docs/algorithms/ from the presets, metrics.md and judging.md: python -m docs.generate."""

from __future__ import annotations

import functools
import inspect
import pathlib
import re

import numpy as np

from docs.differences import DIFFERENCES, LEFT_OUT
from experiments.gates import run as gates
from sapo_jax import corrections
from sapo_jax.objectives import OBJECTIVES, Objective
from sapo_jax.objectives.aggregations import AGGREGATIONS
from sapo_jax.tasks.verifiers.math_equal import same
from sapo_jax.training.metrics import METRICS
from tests.oracles import judged

OUT = pathlib.Path(__file__).parent
CURVE = tuple(np.round(np.linspace(0.02, 4, 200), 4).tolist())
GRID = (0.1, 0.5, 0.8, 1.0, 1.2, 2.0, 5.0, 20.0)
SIDES = (("A > 0", "#0072b2", ""), ("A < 0", "#d55e00", ' stroke-dasharray="6 4"'))
LEVELS = {
    "token": "of each token, r = π_θ/π_old",
    "prefix": "of each token, r = π_θ/π_old, beside those before it",
    "sequence": "of the sequence, the geometric mean s of its tokens' ratios",
    "sequence_token": "of the sequence, s, with the gradient of each token's own log π",
    "product": "of the sequence, the product W of its tokens' ratios",
    "geo_clipped": "of the sequence: the geometric mean after each token's log-ratio is clipped",
}
METRICS_TEXT = """# Metrics

Written by `python -m docs.generate` from `sapo_jax/training/metrics.py`; `sapo-jax list metrics`
prints the same. A run writes a record an iteration: a line of JSON in `metrics/part-*.jsonl`, and
its numbers and histograms to TensorBoard. The last column names the field of the config that must
be set, or what else it takes; without it the key is not there. `<task>` is a name in
`config.tasks`, `<name>` one in `config.evals`, `<k>` a number, `<field>` a hyperparameter.

Numerators and denominators are added up over micro-batches, devices and minibatches and divided
once; `minibatch` has the numbers of each update. A number that is not finite is `null`, and so
is what an iteration or an update had no token for. `ratio/`, `coefficient/` and `histogram/ratio`
leave the first minibatch out, unless it is the only one: without staleness it is learnt by the
policy that sampled it, and the paper's Figures 2 and 3 leave it out, too. `minibatch` has each of
them. Ratios under `ratio/` are of tokens, whatever the objective's level, and τ there is the
objective's, by the sign of A, or SAPO's where it has none.

Times are of the wall clock; in a sweep, a run's share of its cohort's. "In a healthy run" is what
the runs of this repository show, and for `ratio/` and `coefficient/` what the paper's figures show
or a policy near its sampler has to: something to compare with first, no law.
"""
JUDGING_TEXT = r"""# How answers in mathematics are judged

Written by `python -m docs.generate` from `tests/oracles/math_answers.txt`; a test asserts that it
is up to date. `math_answer`, and `prepared` with `verifier="boxed"`, compare what is in the last
`\boxed{}` of a completion with the reference. A wrong answer that is paid teaches something wrong,
a right one that is refused only costs time: when in doubt, an answer is refused.

1. Both are brought to one notation (`\dfrac`, `²`, `√`, `−`, spaces, `$`). What is then the same
   text is right. Nothing of more than 300 characters, or with other symbols, is an answer;
   references that nothing can meet are refused, with their lines, when the data are read.
2. Each is read as what it is: a number, an expression, words, a list, a set, a point, a part of
   the real line, an equation, an inequality, a choice. A name (`x =`, `\angle ABC =`) or a unit
   that only one side has is passed over, another one is an error. A bare letter is a variable.
3. Like is compared with like. A literal number must be answered by a literal number of the same
   exact value: the question boxed again (`17*23`) earns nothing, nor does a rounded value, nor an
   equation that is still to be solved. Rational numbers are exact; all others have 60, 400 or 3200
   digits, and what those do not decide is refused. Expressions with variables must agree at fixed
   rational points.

All of it is a small grammar, and arithmetic within a budget of work: no answer hangs it, runs as
code, or fills the memory.

The labels and the judge have the same authors: expect some errors of both sorts on other answers.
Of 1,348 answers of public models to problems of MATH, OlympiadBench, college math, Minerva, GSM8K
(the mixed data of tangzhy/RealCritic), 668 are paid; read by hand, all of those are right. Below,
wrong answers are tried with the reference and the answer exchanged, too.

| kind | right answers | of them refused | wrong answers | of them paid |
|---|---|---|---|---|
"""
METRICS_GROUPS = {
    "": "The record", "run": "Collapse", "reward": "Rewards", "eval": "Evaluation",
    "length": "Lengths", "policy": "Policy and gate", "ratio": "Ratios and sequences",
    "coefficient": "Coefficients by quadrant", "objective": "Objective", "grad": "Gradient",
    "advantage": "Advantages",
    "sampler": "Sampler and learner", "correction": "Sampler corrections", "router": "Routers",
    "histogram": "Histograms", "data": "Data", "time": "Time",
}  # fmt: skip


@functools.cache
def coefficients(name: str) -> tuple[np.ndarray, np.ndarray]:
    """c for A = 1 and A = −1 at the ratios CURVE and then GRID, see experiments/gates."""
    return tuple(gates.coefficients(gates.named(name), np.array((*CURVE, *GRID))))


def _described(gate) -> tuple[str, str]:
    """Formula and source from a gate's docstring."""
    text = inspect.getdoc(gate) or ""
    body, _, source = text.partition("Source: ")
    return " ".join(body.split()).rstrip("."), " ".join(source.split()).rstrip(".")


def _formula(name: str, preset: Objective) -> tuple[str, str]:
    formula, source = _described(preset.gate)
    extra = {
        "dapo": "arXiv 2503.14476", "grpo": "arXiv 2402.03300", "dr_grpo": "arXiv 2503.20783",
        "grpo_r2": "arXiv 2511.20347, section 5.1", "sapo_sequence": "this project (f(s) for f(r))",
        "gspo": "arXiv 2507.18071", "gspo_token": "arXiv 2507.18071, Eq. 13",
        "luspo": "arXiv 2602.05261",
    }.get(name)  # fmt: skip
    of_gate = "the gate" if name.startswith("sapo") else "the clip"
    return formula, f"{extra}; {of_gate}: {source}" if extra else source


def _panel(name: str, title: str, x0: int, values: dict[str, np.ndarray], r: np.ndarray) -> str:
    """One plot of an SVG: curves over r, with a frame, ticks and a label."""
    top = max(1.25, min(5.0, max(float(v.max()) for v in values.values()) * 1.08))
    left, width, height, base = x0 + 44, 270, 170, 200

    def at(x: float, y: float) -> str:
        return f"{left + width * x / 4:.1f},{base - height * min(y, top) / top:.1f}"

    parts = [f'<text x="{left}" y="18" font-weight="bold">{title}</text>']
    for tick in (0, 1, 2, 3, 4):
        x = left + width * tick / 4
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{tick}</text>')
    step = 0.5 if top < 3 else 1.0
    for i in range(int(top / step) + 1):
        y = base - height * i * step / top
        parts.append(
            f'<path d="M{left} {y:.1f}h{width}" stroke="#dfe3e8"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>'
        )
    for (label, colour, dash), y_n in zip(SIDES, values.values(), strict=True):
        points = " ".join(at(x, y) for x, y in zip(r, y_n, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}>'
            f"<title>{name}, {label}</title></polyline>"
        )
    parts.append(f'<text x="{left + width / 2}" y="{base + 32}" text-anchor="middle">r</text>')
    return "".join(parts)


def plot(name: str) -> str:
    """An SVG of w and c over the ratio, for both signs of the advantage."""
    r = np.array(CURVE)
    pairs = zip(SIDES, coefficients(name), strict=True)
    c = {side[0]: values[: len(CURVE)] for side, values in pairs}
    w = {label: values / r for label, values in c.items()}
    legend = "".join(
        f'<path d="M{520 + 66 * i} 14h18" stroke="{colour}" stroke-width="2"{dash}/>'
        f'<text x="{542 + 66 * i}" y="18">{label.replace("<", "&lt;").replace(">", "&gt;")}</text>'
        for i, (label, colour, dash) in enumerate(SIDES)
    )
    body = _panel(name, "gate weight w", 0, w, r) + _panel(name, "coefficient c = r·w", 330, c, r)
    body = re.sub(r"(, A )([<>])", lambda m: m[1] + {"<": "&lt;", ">": "&gt;"}[m[2]], body)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 240" font-size="12" '
        f'font-family="sans-serif" fill="#24292f"><rect width="660" height="240" fill="#fff"/>'
        f"{body}{legend}</svg>\n"
    )


def _table(name: str) -> list[str]:
    lines = ["| r | " + " | ".join(f"{r:g}" for r in GRID) + " |", "|---" * (len(GRID) + 1) + "|"]
    for (label, *_), side in zip(SIDES, coefficients(name), strict=True):
        c = side[len(CURVE) :]
        for symbol, values in (("w", c / np.array(GRID)), ("c", c)):
            cells = " | ".join(f"{v:.4g}" for v in values)
            lines.append(f"| {symbol}, {label} | {cells} |")
    return lines


def page(name: str) -> str:
    """The Markdown of one preset."""
    preset = OBJECTIVES[name]
    formula, source = _formula(name, preset)
    held = preset.hyperparameters.items()
    defaults = [f"| `{k}` | {'required' if v is None else f'{v:g}'} |" for k, v in held]
    ratio = f"`{preset.ratio}`: {LEVELS[preset.ratio]}"
    lines = [
        f"# {name}", "",
        f"{formula}.", "",
        f"Source: {source}.", "",
        f"- ratio: {ratio}",
        f"- aggregation: `{preset.aggregation}`, {AGGREGATIONS[preset.aggregation]}",
        "- `kl_coef` weighs a penalty on KL(π_old‖π_θ), estimated by r − 1 − log r"
        if preset.kl_against == "old"
        else "- `kl_coef` weighs a penalty on KL(π_θ‖π_ref), with the estimator `kl` (k1, k2, k3; "
        "off-policy k1_r, k3_r, which are multiplied by r)",
    ]  # fmt: skip
    if preset.replay != "none":
        lines.append(f"- routing replay `{preset.replay}`, where the model has experts")
    if "eps_low" in preset.hyperparameters:
        unit = "of log r" if preset.ratio == "geo_clipped" else "of the ratio from 1"
        lines.append(f"- ε are distances {unit}")
    lines += ["", "| hyperparameter | default |", "|---|---|", *defaults, ""]
    lines += [f"![w and c over the ratio]({name}.svg)", ""]
    lines += ["For a completion of one token with π_old = ½, A = ±1, without a KL penalty:", ""]
    lines += [*_table(name), "", "## Differences between implementations", ""]
    lines += [f"- {text}" for text in DIFFERENCES[name]]
    return "\n".join(lines) + "\n"


def index() -> str:
    """The overview: all presets, and the parts that go with any of them."""
    lines = [
        "# Algorithms", "",
        "Written by `python -m docs.generate` from the presets; a test asserts that it is up to "
        "date. Every method is Σ c·A·∇log π: its gate weight is w, its coefficient c = r·w.", "",
        "| preset | ratio | aggregation | c at r = ½, 2 for A > 0 | for A < 0 |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, preset in OBJECTIVES.items():
        at = [len(CURVE) + GRID.index(r) for r in (0.5, 2.0)]
        cells = [", ".join(f"{v:.3g}" for v in side[at]) for side in coefficients(name)]
        row = (f"[{name}]({name}.md)", preset.ratio, preset.aggregation, *cells)
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "", "## Sampler corrections", "",
        "`config.correction.name`; weights of tokens by ρ = π_old/π_sampler, both of the same "
        "parameters, the first by the learner (`learner.old_logp=\"recompute\"`).", "",
        "| correction | level of ρ | bounds | source |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, rule in corrections.CORRECTIONS.items():
        bounds = ", ".join(f"{k} {v:g}" for k, v in rule.bounds.items())
        lines.append(f"| {name} | {rule.ratio} | {bounds} | {rule.source} |")
    lines += ["", "## Left out", "", *(f"- {name}: {why}" for name, why in LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """The table of metric keys, by what stands before the slash."""
    lines = [METRICS_TEXT]
    for group, title in METRICS_GROUPS.items():
        lines += [f"## {title}", "", "| key | meaning | unit | in a healthy run | only with |"]
        lines += ["|---|---|---|---|---|"]
        for key, row in METRICS.items():
            if group == (key.partition("/")[0] if "/" in key else ""):
                cells = (f"`{key}`", row.meaning, row.unit, row.healthy, row.when)
                lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def judging() -> str:
    """The labelled answers counted by kind, and the right ones that are refused."""
    counts: dict[str, list[int]] = {}
    missed = []
    for kind, verdict, gold, answer in judged.pairs():
        row = counts.setdefault(kind, [0, 0, 0, 0])
        right, found = verdict in ("right", "missed"), same(gold, answer)
        row[0 if right else 2] += 1
        row[1 if right else 3] += right != found
        if verdict == "wrong":  # in both directions
            row[2] += 1
            row[3] += same(answer, gold)
        if right and not found:
            missed.append(
                f"| `{gold}` | `{answer}` |".replace("||", "|").replace("|a-b|", "\\|a-b\\|")
            )
    rows = [
        *counts.items(),
        ("**all**", [sum(column) for column in zip(*counts.values(), strict=True)]),
    ]
    table = [f"| {kind} | {' | '.join(map(str, row))} |" for kind, row in rows]
    head = ["", "Refused, though right:", "", "| reference | answer |", "|---|---|"]
    return JUDGING_TEXT + "\n".join([*table, *head, *missed]) + "\n"


def files() -> dict[str, str]:
    """Every generated file by its path in docs/."""
    pages = {f"algorithms/{name}.md": page(name) for name in OBJECTIVES}
    plots = {f"algorithms/{name}.svg": plot(name) for name in OBJECTIVES}
    tables = {"metrics.md": metrics(), "judging.md": judging()}
    return {"algorithms/README.md": index(), **pages, **plots, **tables}


def main() -> None:
    """Write what is new, remove what no preset has."""
    (OUT / "algorithms").mkdir(exist_ok=True)
    wanted = files()
    for old in (OUT / "algorithms").iterdir():
        if f"algorithms/{old.name}" not in wanted:
            old.unlink()
    for name, content in wanted.items():
        (OUT / name).write_text(content, encoding="utf-8")
    print(f"{len(wanted)} files in {OUT}")


if __name__ == "__main__":
    main()
