"""Run the quickstart for several seeds and objectives, and draw their learning curves.

    python -m experiments.quickstart.run --seeds=5 --objectives=sapo,grpo,gspo

Each seed has its own cold start, which its objectives share. Complete runs are not repeated;
`results/` gets their metrics, a table and a figure, the README the table, docs/ a picture.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from experiments.evidence.study import fill, markdown
from sapo_jax import cli
from sapo_jax.report import run as report
from sapo_jax.training.workdir import read_metrics

HERE = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/experiments/quickstart")
ONE, PICTURE = "sapo-0", HERE.parents[1] / "docs" / "quickstart.png"
FLAGS = cli.Flags("experiments.quickstart.run", __doc__)
FLAGS.integer("seeds", 5, "Number of seeds.")
FLAGS.words("objectives", ["sapo", "grpo", "gspo"], "Presets to compare.")
FLAGS.boolean("plot_only", False, "Draw from results/metrics.json, run nothing.")
SHOWN = ("iteration", "eval/pass_at_1", "reward/mean", "policy/entropy", "policy/kl_old")


def train(config: str, workdir: pathlib.Path, *overrides: str) -> list[dict]:
    """One run, and those of its metrics that are shown."""
    command = [sys.executable, "-m", "sapo_jax.main", f"--config=configs/{config}.py"]
    subprocess.run([*command, f"--workdir={workdir}", *overrides], check=True)
    return [{k: r[k] for k in SHOWN if r.get(k) is not None} for r in read_metrics(workdir)]


def collect(seeds: int, objectives: list[str]) -> dict[str, list[list[dict]]]:
    """Metrics by objective and seed; the cold starts under "cold start"."""
    results: dict = {name: [] for name in ("cold start", *objectives)}
    for seed in range(seeds):
        cold, with_seed = RUNS / f"cold-{seed}", f"--config.seed={seed}"
        results["cold start"].append(train("quickstart_sft", cold, with_seed))
        for name in objectives:
            flags_ = (with_seed, f"--config.init_from={cold}", f"--config.objective.name={name}")
            results[name].append(train("quickstart", RUNS / f"{name}-{seed}", *flags_))
    return results


def curve(runs: list[list[dict]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations, and values by seed."""
    points = [[(r["iteration"], r[key]) for r in run if key in r] for run in runs]
    return np.array([x for x, _ in points[0]]), np.array([[y for _, y in run] for run in points])


def table(results: dict) -> str:
    """Pass@1 before and after, as Markdown."""
    rows = []
    for name in results:
        _, values = curve(results[name], "eval/pass_at_1")
        start, end = values[:, 0], values[:, -1]
        rows.append([
            name, str(len(end)), f"{start.min():.2f} to {start.max():.2f}",
            f"{end.mean():.3f} ({end.min():.3f} to {end.max():.3f})",
        ])  # fmt: skip
    columns = ["objective", "seeds", "Pass@1 at the start", "Pass@1 at the end: mean (range)"]
    return markdown(columns, rows)


def draw(results: dict, path: pathlib.Path) -> None:
    """Learning curves: a line per seed, the mean of the seeds in bold."""
    from matplotlib.figure import Figure

    panels = {"eval/pass_at_1": "held-out Pass@1", "policy/entropy": "entropy, nats per token"}
    colours = dict(zip(results, ("#777777", "#0072B2", "#009E73", "#D55E00"), strict=False))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for ax, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, runs in results.items():
            if name != "cold start":
                x, values = curve(runs, key)
                ax.plot(x, values.T, color=colours[name], alpha=0.3, linewidth=1)
                ax.plot(x, values.mean(0), color=colours[name], linewidth=2, label=name)
        ax.set_xlabel("iteration (4 updates each)")
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(given: cli.Flags) -> None:
    """Run what is missing, then write the results."""
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    stored = out / "metrics.json"
    if given.plot_only:
        results = json.loads(stored.read_text())
    else:
        results = collect(given.seeds, given.objectives)
        stored.write_text(json.dumps(results))
        if (RUNS / ONE).exists():
            shutil.rmtree(out / ONE, ignore_errors=True)
            shutil.copytree(RUNS / ONE / "metrics", out / ONE / "metrics")
            shutil.copy(RUNS / ONE / "config.json", out / ONE)
    found = table(results)
    (out / "table.md").write_text(found)
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), "result", found))
    draw(results, out / "curves.png")
    report.picture(out / ONE, PICTURE)
    print(found)


if __name__ == "__main__":
    cli.run(main, FLAGS)
