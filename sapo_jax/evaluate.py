"""Pass@1 and Pass@k of a policy on held-out sets, with intervals.

The policy is that of a run (--workdir) or of a Hugging Face directory (--hf). A run has tasks, a
tokenizer and numbers of its own: with --workdir the defaults marked * are the run's, not these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from etils import epath

from sapo_jax import cli, model, rewards, sampler, tasks
from sapo_jax.data import encode, hf_tokenizer, stream
from sapo_jax.data.tokenizer import CharTokenizer, Tokenizer
from sapo_jax.tasks import Task
from sapo_jax.training import checkpoint, files, parameters, settings
from sapo_jax.training.checks import LARGEST, MOST
from sapo_jax.training.evaluation import evaluate
from sapo_jax.training.progress import Progress

FLAGS = cli.Flags("evaluate", __doc__, "--workdir=…", "--hf=… --task=…")
FLAGS.string("workdir", "", "Run directory of the policy.")
FLAGS.string("hf", "", "Hugging Face directory of the policy, in place of --workdir.")
FLAGS.enum("which", "latest", ["latest", "best"], "Checkpoint of the run.")
FLAGS.strings("task", [], "* NAME,option=value,… of a set, once or more; also my.py:MyTask.")
FLAGS.strings("eval", [], "* NAME in config.evals of the run, once or more.")
FLAGS.string(
    "reward", "", "* my.py:name, a reward function whose mean is reported, too.",
    field="reward.function",
)  # fmt: skip
FLAGS.integer("prompts", 512, "* At most this many prompts of the test split.", 1)
FLAGS.integer("samples", 16, "* Completions per prompt.", 1)
FLAGS.number("temperature", 1.0, "* Of sampling; 0 is greedy.", 0.0)
FLAGS.integer("top_k", None, "* Keep the k likeliest tokens.", 1)
FLAGS.number("top_p", None, "* Keep the smallest set of this probability.", 0.0, 1.0)
FLAGS.integer("max_prompt_tokens", 512, "* Longer prompts are left out.", 1)
FLAGS.integer("max_image_tokens", 256, "Of a prompt's images; those with more are left out.", 1)
FLAGS.integer("max_new_tokens", 1024, "* Room for a completion.", 1)
FLAGS.integer("seed", 0, "* Of the sampling noise.", 0)
FLAGS.integer("batch", 8, "Prompts that are sampled at a time.", 1)
FLAGS.integer("workers", 1, "Rows judged at a time.", 1, upper_bound=MOST["reward.workers"])
FLAGS.enum("dtype", "float32", ["float32", "bfloat16"], "Of everything. Only with --hf.")
FLAGS.boolean("chat", True, "Prompts by the directory's chat template. Only with --hf.")
FLAGS.string("system", "", "System message of each prompt. Only with --hf.")
FLAGS.string(
    "template_options", "",
    "name=value,… for the template, such as enable_thinking=False. Only with --hf.",
)  # fmt: skip
FLAGS.string("compilation_cache", ".cache/xla", "Compiled programs, reused later; empty: none.")
FLAGS.string("out", "", "JSON file for the results.")
RECORDED = (  # in the results
    "hf", "workdir", "which", "reward", "prompts", "samples", "temperature", "top_k", "top_p",
    "max_prompt_tokens", "max_image_tokens", "max_new_tokens", "seed", "dtype", "chat", "system",
    "template_options",
)  # fmt: skip
EVALUATED = ("prompts", "samples", "temperature", "top_k", "top_p")  # of config.eval


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "name,option=value,…"; a value that is no Python literal is a string.

    Raises:
      ValueError: an option without a value, or with one in JSON.
    """
    name, *pairs = _pairs(text)
    return name, _options(pairs, f"--task={name}")


def task_text(name: str, options: Mapping[str, Any]) -> str:
    """What `parse_task` reads as a name and options.

    Raises:
      ValueError: there is no such text.
    """

    def said(value):
        with contextlib.suppress(ValueError):
            return value if isinstance(value, str) and cli.literal(value) == value else repr(value)
        return repr(value)  # 'true', say

    text = ",".join([name, *(f"{option}={said(value)}" for option, value in options.items())])
    if parse_task(text) != (name, dict(options)):
        raise ValueError(f"--task cannot say the options {options}")
    return text


def parse_template_options(text: str) -> dict[str, Any]:
    """Options of "name=value,…", or of a dictionary.

    Raises:
      ValueError: as `parse_task`.
    """
    if not text.startswith("{"):
        return _options(_pairs(text) if text else [], "--template_options")
    return _options([f"options={text}"], "--template_options")["options"]


def _pairs(text: str) -> list[str]:
    return re.split(r",(?=\w+(?:=|$))", text)


def _options(pairs: list[str], flag: str) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag}: {pair!r} must be option=value")
        try:
            options[option] = cli.literal(value)
        except ValueError as error:
            raise ValueError(f"{flag}: {option}={value}: {error}") from None
    return options


class Held(NamedTuple):
    """A set, and how it is sampled where the command line does not say it."""

    task: Task
    numbers: Mapping[str, Any] = MappingProxyType({})


class Policy(NamedTuple):
    """What is evaluated, and on what."""

    config: model.ModelConfig
    params: Any
    tokenizer: Tokenizer
    recipe: rewards.Recipe
    sets: dict[str, Held]


def _sets(given: cli.Flags) -> dict[str, Held]:
    """The tasks of the command line."""
    parsed = {text: parse_task(text) for text in given.task}
    made = {}
    for text, (name, options) in parsed.items():
        try:
            made[text] = Held(tasks.make(name, **options))
        except ValueError as error:
            raise ValueError(f"--task={text}: {error}") from None
    return made


def _sets_of_run(given: cli.Flags, run: settings.Settings) -> dict[str, Held]:
    """The evaluations of a run by name; of one over several tasks, each of these."""
    known = [name for name in run.evals if name]
    for name in given.eval:
        if name not in known:
            has = f"one of {', '.join(known)}" if known else "left out: the run has no config.evals"
            raise ValueError(f"--eval={name}: must be {has}")
    found = {}
    for name in given.eval or run.evals:
        own = run.evals[name]
        numbers = {key: getattr(own, key) for key in EVALUATED}
        for key, task in own.tasks.items():
            label = "/".join(filter(None, [name, key if len(own.tasks) > 1 or not name else ""]))
            found[label] = Held(task, numbers)
    return found


def _of_directory(given: cli.Flags) -> Policy:
    """The policy of --hf."""
    if given.eval:
        raise ValueError(f"--eval={given.eval[0]}: needs the --workdir of a run that has it")
    for flag in ("hf", "task"):
        if not given[flag].value:
            what = given[flag].help.removeprefix("* ").rstrip(".")
            run = ", or --workdir of a run" if flag == "hf" else ""
            raise ValueError(f"--{flag} is missing{run}: {what} (see --help)")
    options = parse_template_options(given.template_options)
    if options and not given.chat:
        raise ValueError("--template_options must not stand beside --chat=False, which uses none")
    sets, recipe = _sets(given), rewards.Recipe(function=given.reward)
    config, params = model.hf.load(epath.Path(given.hf).expanduser(), dtype=given.dtype)
    chat = {"chat": given.chat, "system": given.system, "template_options": options}
    try:
        tokenizer = hf_tokenizer.load(given.hf, vocab_size=config.vocab_size, **chat)
    except ValueError as error:
        raise ValueError(str(error).replace("config.tokenizer.chat", "--chat")) from None
    stop = {"stop_tokens": tokenizer.stop_ids, "pad_token": tokenizer.pad_id}
    config = dataclasses.replace(config, **stop)
    return Policy(config, params, tokenizer, recipe, sets)


def _of_run(given: cli.Flags) -> Policy:
    """The policy of --workdir; flags that are not given become what the run has."""
    for flag in ("hf", "dtype", "chat", "system", "template_options"):
        if given[flag].present:
            raise ValueError(f"--{flag} must not stand beside --workdir: the run says it")
    run = settings.of_run(given.workdir)
    if given.task and given.eval:
        raise ValueError(f"--eval={given.eval[0]}: must not stand beside --task")
    c, recipe, sets = run.config, run.recipe, _sets(given) or _sets_of_run(given, run)
    if given.reward:
        recipe = dataclasses.replace(recipe, function=given.reward)
    own = {"reward": recipe.function, "seed": c.seed, "dtype": c.dtype.compute}
    width, room = run.width, run.max_new_tokens
    if isinstance(run.tokenizer, CharTokenizer):  # other tasks may need more
        whole = tasks.Mixture({label: held.task for label, held in sets.items()})
        images = run.images.tokens if run.images and whole.max_images else 0
        width = max(width, whole.max_prompt_chars + images)
        room = max(room, whole.max_completion_chars + 1)
    own |= {"max_prompt_tokens": width, "max_new_tokens": room}
    own |= {"max_image_tokens": run.images.tokens} if run.images else {}
    own |= {name: getattr(c.eval, name) for name in EVALUATED}
    for name, value in own.items():
        if not given[name].present:
            given[name].value = value
    workdir = files.normal(given.workdir)
    iteration = checkpoint.find(workdir / "checkpoints", which=given.which)
    params = parameters.learnt(run, workdir, iteration)
    return Policy(run.model, params, run.tokenizer, recipe, sets)


def _check_sight(policy: Policy) -> None:
    """Refuse sets with images for a policy of text."""
    if policy.config.vision is not None:
        return
    blind = f"the policy's model_type={policy.config.model_type!r} sees none"
    for text, (task, _) in policy.sets.items():
        if getattr(task, "max_images", 0):
            raise ValueError(f"--task={text}: has images: must be of text alone, for {blind}")


def _numbers(given: cli.Flags, held: Held) -> dict[str, Any]:
    """How a set is sampled."""
    flags = {name: given[name].value for name in EVALUATED if given[name].present}
    return {name: given[name].value for name in EVALUATED} | held.numbers | flags


def _evaluate_set(given: cli.Flags, policy: Policy, text: str) -> dict:
    """Metrics of one evaluation set."""
    (task, _), tokenizer = policy.sets[text], policy.tokenizer
    own = _numbers(given, policy.sets[text])
    prompts, samples = own.pop("prompts"), own.pop("samples")
    width, room = given.max_prompt_tokens, given.max_new_tokens
    sees = getattr(task, "max_images", 0)
    images = model.vision.Room(policy.config, given.max_image_tokens, sees) if sees else None
    fits = stream.Fits(tokenizer, width, images=images)
    examples = list(encode.distinct(task.examples("test"), prompts, keep=fits))
    if not examples:
        shown = f" and --max_image_tokens={given.max_image_tokens}" * bool(sees)
        raise ValueError(f"--task={text}: no prompt fits --max_prompt_tokens={width}{shown}")
    batch = min(given.batch, len(examples))
    most = LARGEST // (batch * (width + room))
    if samples > most:
        rows = f"at most {most} with {batch} prompts at a time and rows of {width + room} tokens"
        raise ValueError(f"--samples={samples}: must be {rows}")
    rollout = partial(
        sampler.rollout, policy.params, policy.config, group_size=samples, max_new_tokens=room,
        seed=given.seed, iteration=0, domain="eval", **own,
    )  # fmt: skip
    left = len(examples)

    def sample(prompts, on_groups):
        nonlocal left
        rows = rollout(prompts, on_groups=on_groups[0])
        bar.step(min(batch, left))
        left -= min(batch, left)
        return [sampler.ends(rows)[0]]

    with (
        Progress(len(examples), text, "prompt") as bar,
        rewards.Scorer(task, policy.recipe, workers=given.workers) as scorer,
    ):
        first = encode.encode_prompts(examples[:batch], tokenizer, width, images)
        rollout(first, warm_up=lambda what: bar.note(f"compiling: {what}"))
        bar.note("sampling")
        controls = {"samples": samples, "width": width, "batch": batch, "images": images}
        (metrics,) = evaluate(sample, scorer, examples, tokenizer, **controls)
    return {"eval/prompts": len(examples), **metrics}


def _line(text: str, metrics: dict, samples: int) -> str:
    low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    each = "mean of " * (samples > 1) + cli.several(samples, "sample")
    of = cli.several(metrics["eval/prompts"], "prompt")
    sure = f"95% interval {low:.4f} to {high:.4f}; {each} of {of}"
    parts = [f"Pass@1 {metrics['eval/pass_at_1']:.4f} ({sure})"]
    if samples > 1:
        parts.append(f"Pass@{samples} {metrics[f'eval/pass_at_{samples}']:.4f}")
    parts.append(f"length {metrics['eval/length_mean']:.1f}")
    if "eval/reward_function" in metrics:
        parts.append(f"reward {metrics['eval/reward_function']:.4f}")
    return f"{text}: {', '.join(parts)}"


def is_result(content: bytes) -> bool:
    """Whether a file is what ``--out`` writes."""
    return content.startswith(b'{\n "settings": {')


def main(given: cli.Flags) -> None:
    """Evaluate a policy on the sets that the flags name."""
    if given.out:
        files.check_file(given.out, "--out=", is_result, "an earlier result")
    # Refused before a model is read.
    sampler.sampling.controls(given.temperature, given.top_k, given.top_p)
    cli.use_cache(given.compilation_cache, "--compilation_cache")
    policy = _of_run(given) if given.workdir else _of_directory(given)
    _check_sight(policy)
    policy = policy._replace(params=sampler.to_sampler(policy.params, policy.config))
    found, numbers = {}, {}
    for text in policy.sets:
        found[text] = _evaluate_set(given, policy, text)
        numbers[text] = _numbers(given, policy.sets[text])
        print(_line(text, found[text], numbers[text]["samples"]), flush=True)
    if given.out:
        same = numbers[text] if all(own == numbers[text] for own in numbers.values()) else {}
        shown = {name: given[name].value for name in RECORDED} | same
        own = {} if same else {"evals": numbers}
        results = {"settings": shown | own, "sets": found}
        files.write_text(files.normal(given.out), json.dumps(results, indent=1))
        print(f"written: {given.out}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
