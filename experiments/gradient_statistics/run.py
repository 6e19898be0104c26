"""Gradient statistics of a run: its newest policy, moved on by its own updates, in the lab.

    python -m experiments.gradient_statistics.run --workdir=runs/quickstart --name=quickstart
    python -m experiments.gradient_statistics.run --summarise=quickstart_0,quickstart_moe

`results/<name>.json` and `results/<name>.html`; the second form writes `results/summary.md`.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from sapo_jax import gradlab, learner, objectives, rewards, sampler
from sapo_jax.data import encode
from sapo_jax.parallel import sharding
from sapo_jax.report.gradlab import write
from sapo_jax.training import checkpoint, experience, provenance, settings, startup
from sapo_jax.training.engine import Streamed
from sapo_jax.training.progress import Clock
from sapo_jax.training.workdir import config_of_run
from sapo_jax.types import Batch

HERE = pathlib.Path(__file__).parent
DEFAULT = [
    "sapo", "sapo_softsign", "grpo", "dapo", "gspo", "gmpo", "cispo", "p3o", "reinforce", "maspo",
    "mhpo_unit", "vespo",
]  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_NAME = flags.DEFINE_string("name", "quickstart", "Of the files in results/.")
_OBJECTIVES = flags.DEFINE_list("objectives", DEFAULT, "Presets to compare.")
_UPDATES = flags.DEFINE_list("updates", ["0", "1", "2", "3", "15"], "Updates since sampling.")
_RATE = flags.DEFINE_float("learning_rate", None, "Of those updates; the run's by default.")
_FRESH = flags.DEFINE_integer("fresh", 16, "Fresh samples for each frozen one, at least 16.")
_FOCUS = flags.DEFINE_string(
    "focus", "sapo", "The preset whose gate is shown by buckets of tokens."
)
_SUMMARISE = flags.DEFINE_list("summarise", [], "Names to put into one table; runs nothing.")


def load(workdir: str, learning_rate: float | None = None) -> settings.Settings:
    """The settings of a run, without dynamic sampling, perhaps with another learning rate."""
    config = config_of_run(workdir)
    with config.unlocked():
        config.batch.oversample = 1
        config.learner.learning_rate = learning_rate or config.learner.learning_rate
    return settings.from_config(config)


def concatenate(parts: tuple[Batch, ...]) -> Batch:
    """Minibatches as one batch."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def draw(
    checked: settings.Settings, scorer: rewards.Scorer, params: Any, examples: list,
    group_size: int, salt: int,
) -> tuple[Batch, np.ndarray]:  # fmt: skip
    """Fresh samples of the prompts by one policy: rows, and their rewards."""
    groups = rewards.Groups(scorer, examples, checked.tokenizer)
    slots, parts = max(1, 1024 // group_size), sharding.parts(checked.mesh)
    rollout = sampler.rollout(
        params,
        checked.model,
        encode.encode_prompts(examples, checked.tokenizer, checked.width),
        group_size=group_size,
        max_new_tokens=checked.max_new_tokens,
        temperature=checked.config.sampler.temperature,
        seed=checked.config.seed,
        iteration=salt,
        domain="gradient_lab",
        plan=sampler.make_plan(
            len(examples), checked.max_new_tokens, slots=slots, shrink=0, parts=parts
        ),
        on_groups=groups,
    )
    rewards_B, _ = rewards.combine([v.parts for v in groups.wait()], checked.recipe)
    batch = experience.batch_of(rollout)
    if checked.hp.static.routing_replay == "R2":
        hp = in_passes(checked, len(rewards_B))
        batch = batch.replace(routing=learner.score_routing(params, batch, hp)[1])
    return batch, rewards_B


def in_passes(checked: settings.Settings, rows: int) -> learner.Hyperparameters:
    """The run's hyperparameters for so many rows, as many in each pass as in the run."""
    parts = rows * checked.config.batch.minibatches // checked.rows
    return checked.hp.replace(micro_batches=checked.hp.static.micro_batches * parts)


def measure(lab: gradlab.Lab, algorithms: dict, focus: str) -> dict[str, Any]:
    """Everything that the lab says at one policy."""
    halves = lab.targets()
    found: dict[str, Any] = {"reward": float(lab.rewards.mean())}
    found["gradients"] = gradlab.compare(lab, halves, algorithms)
    found["tokens"] = gradlab.describe(algorithms, lab.params, lab.frozen, lab.hp)
    if focus:
        scored = gradlab.score(lab.params, lab.frozen, lab.hp)
        kinds = gradlab.buckets(*scored, lab.frozen)
        flat = {(kind, name): m for kind, named in kinds.items() for name, m in named.items()}
        found["groups"] = gradlab.compare_buckets(lab, halves, algorithms[focus], flat)
    return found


def examine(
    checked: settings.Settings, workdir: str, algorithms: dict, updates: list[int], fresh: int,
    focus: str,
) -> dict[str, Any]:  # fmt: skip
    """The run's policy at several numbers of updates after it sampled the same frozen rows.

    Updates are the run's, on the minibatches of other rollouts of the policy that sampled, as far
    as they go: as in training, none of the frozen rows has been learnt from.
    """
    c = checked.config
    prompts, group_size = c.batch.prompts, c.batch.group_size
    with checkpoint.Checkpoints(pathlib.Path(workdir) / "checkpoints") as checkpoints:
        (bundle,), done = startup.start([Streamed(checked)], checkpoints)
    state, (stream,), iteration = bundle.state, bundle.streams, done + 1
    position = stream.position
    examples = stream.take(prompts)
    stream.position = position
    with rewards.Scorer(checked.task, checked.recipe, workers=c.reward.workers) as scorer:

        def rollouts(count: int) -> list[tuple[Batch, ...]]:
            collect = experience.from_rollout
            each = (collect(bundle, iteration + i, Clock(), scorer) for i in range(count))
            return [finish().minibatches for finish in each]

        first, *others = rollouts(1 + -(-max(updates) // c.batch.minibatches))
        frozen, queue = concatenate(first), [batch for parts in others for batch in parts]
        stages = []
        for k in range(max(updates) + 1):
            if k in updates:
                begun = time.monotonic()
                params = jax.tree.map(jnp.copy, state.params)
                batch, rewards_B = draw(checked, scorer, params, examples, fresh * group_size, k)
                hp = in_passes(checked, checked.rows)
                rows = (params, frozen, batch, rewards_B, prompts, c.advantages, hp)
                tile = min(16, len(algorithms) + len(gradlab.UNGATED))
                found = measure(
                    gradlab.Lab(*rows, tile), algorithms, focus if k == max(updates) else ""
                )
                stages.append({"updates": k, **found})
                print(f"{k} updates: {time.monotonic() - begun:.0f} s", flush=True)
            if k < max(updates):
                state, _ = learner.update(state, queue[k], checked.hp)
    return {
        "run": c.name,
        "model": c.model.preset,
        "seed": c.seed,
        "iteration": iteration - 1,
        "trained_with": c.objective.name,
        "learning_rate": c.learner.learning_rate,
        "prompts": prompts,
        "group_size": group_size,
        "fresh": fresh * group_size,
        "focus": focus,
        "provenance": provenance.provenance(),
        "stages": stages,
    }


def summary(names: list[str]) -> str:
    """Fidelities to the expected reward, and of what was removed, from update 3 on, as Markdown."""
    lines = [
        "| run | updates | algorithm | fidelity (95% interval) | minus that of the bare ratio "
        "| mass removed | fidelity of what was removed |",
        "|---|---|---|---|---|---|---|",
    ]

    def interval(entry: dict[str, float | None]) -> str:
        if entry["value"] is None:
            return "–"
        return f"{entry['value']:+.2f} ({entry['low']:+.2f} to {entry['high']:+.2f})"

    for name in names:
        for stage in json.loads((HERE / f"results/{name}.json").read_text())["stages"]:
            found = stage["gradients"]
            for i, algorithm in enumerate(found["names"]) if stage["updates"] >= 3 else ():
                entry, removed = found["fidelity"]["reward"][i], found["removed"]
                lines.append(
                    f"| {name} | {stage['updates']} | {algorithm} | {interval(entry)} "
                    f"| {interval(entry['difference'])} | {removed['mass'][i]:.2%} "
                    f"| {interval(removed['reward'][i])} |"
                )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Examine a run, or sum up several."""
    del argv
    logging.set_verbosity(logging.WARNING)
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    if _SUMMARISE.value:
        (out / "summary.md").write_text(summary(_SUMMARISE.value))
        print(out / "summary.md")
        return
    if _WORKDIR.value is None or _FRESH.value < 16:
        raise app.UsageError(f"--workdir is needed, and --fresh={_FRESH.value} at least 16")
    updates = sorted({int(u) for u in _UPDATES.value})
    algorithms = {name: objectives.named(name) for name in _OBJECTIVES.value}
    checked = load(_WORKDIR.value, _RATE.value)
    found = examine(checked, _WORKDIR.value, algorithms, updates, _FRESH.value, _FOCUS.value)
    path = out / f"{_NAME.value}.json"
    path.write_text(json.dumps(found))
    print(write(path))


if __name__ == "__main__":
    app.run(main)
