"""Gradient statistics of a run: its newest policy, moved on by its own updates, in the lab.

    python -m experiments.gradient_statistics.run --workdir=runs/quickstart --name=mine
    python -m experiments.gradient_statistics.run --summarise=DIR/a.json,DIR/b.json

The first form writes ``<out>/<name>.json`` after each stage, and at the end the page beside it; the
second prints one table of several such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from sapo_jax import cli, gradlab, learner, objectives, report, rewards, sampler
from sapo_jax.data import encode
from sapo_jax.parallel import sharding
from sapo_jax.training import checkpoint, experience, provenance, settings, startup
from sapo_jax.training.checks import require
from sapo_jax.training.engine import Streamed
from sapo_jax.training.files import write_json
from sapo_jax.training.progress import Clock, Progress
from sapo_jax.types import Batch

DEFAULT = [
    "sapo", "sapo_softsign_abs", "grpo", "dapo", "gspo", "gmpo", "cispo", "p3o", "reinforce",
    "maspo", "mhpo_unit", "vespo",
]  # fmt: skip
FLAGS = cli.Flags("experiments.gradient_statistics.run", __doc__)
FLAGS.string("workdir", "", "Run directory.")
FLAGS.string("out", "", "Directory of the results; by default gradlab in that of the run.")
FLAGS.string("name", "gradlab", "Of the files.")
FLAGS.words("objectives", DEFAULT, "Presets to compare.")
FLAGS.words("updates", ["0", "1", "2", "3", "15"], "Updates since sampling.")
FLAGS.number("learning_rate", None, "Of those updates; the run's by default.", 0.0)
FLAGS.integer("fresh", 16, "Fresh samples for each frozen one.", 16)
FLAGS.string("focus", "", "Whose gate is shown by buckets of tokens; by default the first.")
FLAGS.words("summarise", [], "JSON files to put into one table; runs nothing.")


def load(workdir: str, learning_rate: float | None = None) -> settings.Settings:
    """The settings of a run, without dynamic sampling, perhaps with another learning rate.

    The lab looks at rows of one completion.
    """
    changes = {"batch.oversample": 1, "batch.pack": False}
    if learning_rate is not None:
        changes["learner.learning_rate"] = learning_rate
    run = settings.of_run(workdir, changes)
    room = run.config.data.max_image_tokens
    require(not room, "data.max_image_tokens", room, "0: the lab is of text alone")
    if run.model.lora_rank:
        raise ValueError(
            f"{workdir} has adapters, and the lab compares gradients of all parameters: export it, "
            "and name a run that starts from the export"
        )
    return run


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
            len(examples), checked.max_new_tokens, group_size=group_size, slots=slots, parts=parts
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


def measure(
    lab: gradlab.Lab, algorithms: Mapping, focus: str, updates: int, bar: Progress, draws: int
) -> dict[str, Any]:
    """Everything that the lab says at one policy."""
    bar.note(f"{updates} updates: targets")
    halves = lab.targets()
    bar.step()
    bar.note(f"{updates} updates: gradients of {len(algorithms)} algorithms")
    found: dict[str, Any] = {"reward": float(lab.rewards.mean())}
    found["gradients"] = gradlab.compare(lab, halves, algorithms, draws=draws)
    bar.step()
    bar.note(f"{updates} updates: tokens")
    found["tokens"] = gradlab.describe(algorithms, lab.params, lab.frozen, lab.hp)
    if focus:
        scored = gradlab.score(lab.params, lab.frozen, lab.hp)
        kinds = gradlab.buckets(*scored, lab.frozen)
        flat = {(kind, name): m for kind, named in kinds.items() for name, m in named.items()}
        found["groups"] = gradlab.compare_buckets(lab, halves, algorithms[focus], flat)
    bar.step()
    return found


def algorithms_of(names: Sequence[str]) -> dict[str, objectives.Objective]:
    """Objectives by name; an unknown one, or one that lacks a number, is refused."""
    try:
        return {name: objectives.resolve(name) for name in names}
    except ValueError as error:
        raise ValueError(f"--objectives: {error}") from None


def examine(
    checked: settings.Settings, workdir: epath.PathLike, algorithms: Mapping, updates: list[int],
    fresh: int, focus: str, draws: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The run's policy at several numbers of updates after it sampled the same frozen rows.

    Updates are the run's, on the minibatches of other rollouts of the policy that sampled, as far
    as they go: as in training, none of the frozen rows has been learnt from.

    Yields:
      What is known after each stage, JSON-able; shows a bar meanwhile.
    """
    c, last = checked.config, max(updates)
    prompts, samples = c.batch.prompts, fresh * c.batch.group_size
    with checkpoint.Checkpoints(epath.Path(workdir).expanduser() / "checkpoints") as checkpoints:
        (bundle,), done = startup.start([Streamed(checked)], checkpoints)
    state, (stream,) = bundle.state, bundle.streams
    position = stream.position
    examples = stream.take(prompts)
    stream.position = position
    found = {
        "run": c.name,
        "model": c.model.preset,
        "seed": c.seed,
        "iteration": done,
        "trained_with": c.objective.name,
        "learning_rate": c.learner.learning_rate,
        "prompts": prompts,
        "group_size": c.batch.group_size,
        "fresh": samples,
        "focus": focus,
        "provenance": provenance.provenance(),
        "stages": [],
    }
    count = 1 + -(-last // c.batch.minibatches)
    with (
        rewards.Scorer(checked.task, checked.recipe, workers=c.reward.workers) as scorer,
        Progress(count + 4 * len(updates), "gradient lab") as bar,
    ):
        rollouts = []
        for i in range(count):
            bar.note(f"rollout {i + 1} of {count}")
            finish = experience.from_rollout(bundle, done + 1 + i, Clock(), scorer)
            rollouts.append(finish().minibatches)
            bar.step()
        frozen, queue = concatenate(rollouts[0]), [b for each in rollouts[1:] for b in each]
        for k in range(last + 1):
            if k in updates:
                bar.note(f"{k} updates: fresh samples")
                params = jax.tree.map(jnp.copy, state.params)
                batch, rewards_B = draw(checked, scorer, params, examples, samples, k)
                bar.step()
                hp = in_passes(checked, checked.rows)
                rows = (params, frozen, batch, rewards_B, prompts, c.advantages, hp)
                lab = gradlab.Lab(*rows, min(16, len(algorithms) + len(gradlab.UNGATED)))
                stage = measure(lab, algorithms, focus if k == last else "", k, bar, draws)
                found["stages"].append({"updates": k, **stage})
                yield found
            if k < last:
                state, _ = learner.update(state, queue[k], checked.hp)


def summary(paths: list[str]) -> str:
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

    for path in map(epath.Path, paths):
        for stage in json.loads(path.read_text())["stages"]:
            found = stage["gradients"]
            for i, algorithm in enumerate(found["names"]) if stage["updates"] >= 3 else ():
                entry, removed = found["fidelity"]["reward"][i], found["removed"]
                mass = "–" if removed["mass"][i] is None else f"{removed['mass'][i]:.2%}"
                lines.append(
                    f"| {path.stem} | {stage['updates']} | {algorithm} | {interval(entry)} "
                    f"| {interval(entry['difference'])} | {mass} "
                    f"| {interval(removed['reward'][i])} |"
                )
    return "\n".join(lines)


def page(path: epath.Path) -> str:
    """Write the page of results, where this machine can draw: a line that says where it is."""
    try:
        from sapo_jax.report.gradlab import write

        return f"report: {write(path)}"
    except ImportError:
        pass
    except Exception as error:  # the numbers are written: a page is not worth them
        logging.warning("No report: %s: %s", type(error).__name__, error)
    return report.no_page(path)


def main(given: cli.Flags) -> None:
    """Examine a run, or sum up several."""
    if given.summarise:
        print(summary(given.summarise))
        return
    if not given.workdir:
        raise ValueError("--workdir is missing: the directory of a run")
    if not all(text.isdecimal() for text in given.updates) or not given.updates:
        raise ValueError(f"--updates={','.join(given.updates)}: must be whole numbers from 0 on")
    updates, algorithms = sorted(set(map(int, given.updates))), algorithms_of(given.objectives)
    focus = given.focus or next(iter(algorithms), "")
    if focus not in algorithms:
        among = ", ".join(algorithms) or "nothing"
        raise ValueError(f"--focus={focus}: must be among --objectives, which are {among}")
    checked = load(given.workdir, given.learning_rate)
    if checked.supervised:
        raise ValueError(
            f"--workdir={given.workdir}: its run has source=demonstrations, no rewards"
        )
    samples = given.fresh * checked.config.batch.group_size
    if samples % 2:
        raise ValueError(f"--fresh={given.fresh}: must be even, for two halves of {samples}")
    cli.use_cache(checked.config.compilation_cache)
    out = epath.Path(given.out or epath.Path(given.workdir) / "gradlab").expanduser()
    path = out / f"{given.name}.json"
    for found in examine(checked, given.workdir, algorithms, updates, given.fresh, focus):
        write_json(path, found)  # after every stage: what is known is not lost
    print(f"results: {path}\n{page(path)}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
