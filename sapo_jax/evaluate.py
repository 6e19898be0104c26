"""Pass@1 and Pass@k of a Hugging Face directory on held-out sets, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from etils import epath

from sapo_jax import cli, model, rewards, sampler, tasks
from sapo_jax.data import encode, hf_tokenizer, stream
from sapo_jax.training import files
from sapo_jax.training.checks import LARGEST, MOST
from sapo_jax.training.evaluation import evaluate

FLAGS = cli.Flags("evaluate", __doc__)
FLAGS.string("hf", "", "Hugging Face directory of the policy.", required=True)
FLAGS.strings("task", [], "NAME,option=value,… of a set; NAME may be my.py:MyTask.", required=True)
FLAGS.string("reward", "", "my.py:name, a reward function whose mean is reported, too.")
FLAGS.integer("prompts", 512, "At most this many prompts of the test split.", 1)
FLAGS.integer("samples", 16, "Completions per prompt.", 1)
FLAGS.number("temperature", 1.0, "Of sampling; 0 is greedy.", 0.0)
FLAGS.integer("top_k", None, "Keep the k likeliest tokens.", 1)
FLAGS.number("top_p", None, "Keep the smallest set of this probability.", 0.0, 1.0)
FLAGS.integer("max_prompt_tokens", 512, "Longer prompts are left out.", 1)
FLAGS.integer("max_new_tokens", 1024, "Room for a completion.", 1)
FLAGS.integer("batch", 8, "Prompts that are sampled at a time.", 1)
FLAGS.integer("seed", 0, "Of the sampling noise.", 0)
FLAGS.integer("workers", 1, "Rows judged at a time.", 1, upper_bound=MOST["reward.workers"])
FLAGS.enum("dtype", "float32", ["float32", "bfloat16"], "Of everything.")
FLAGS.boolean("chat", True, "Prompts by the directory's chat template.")
FLAGS.string("system", "", "System message of each prompt.")
FLAGS.string("compilation_cache", ".cache/xla", "Compiled programs, reused later; empty: none.")
FLAGS.string("out", "", "JSON file for the results.")
RECORDED = (  # in the results
    "hf", "reward", "prompts", "samples", "temperature", "top_k", "top_p", "max_prompt_tokens",
    "max_new_tokens", "seed", "dtype", "chat", "system",
)  # fmt: skip


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "name,option=value,…"; a value that is no Python literal is a string.

    Raises:
      ValueError: an option without a value, or with one in JSON.
    """
    name, *pairs = re.split(r",(?=\w+(?:=|$))", text)
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--task={text}: {pair!r} must be option=value")
        try:
            options[option] = cli.literal(value)
        except ValueError as error:
            raise ValueError(f"--task={name}: {option}={value}: {error}") from None
    return name, options


def _evaluate_set(
    given: cli.Flags, config: model.ModelConfig, params: Any, tokenizer, text: str
) -> dict:
    """Metrics of one evaluation set."""
    from tqdm import tqdm

    name, options = parse_task(text)
    task = tasks.make(name, **options)
    width, room = given.max_prompt_tokens, given.max_new_tokens
    fits = stream.Fits(tokenizer, width)
    examples = list(encode.distinct(task.examples("test"), given.prompts, keep=fits))
    if not examples:
        raise ValueError(f"--task={text}: no prompt fits --max_prompt_tokens={width}")
    batch, recipe = min(given.batch, len(examples)), rewards.Recipe(function=given.reward)
    most = LARGEST // (batch * (width + room))
    if given.samples > most:
        rows = f"at most {most} with {batch} prompts at a time and rows of {width + room} tokens"
        raise ValueError(f"--samples={given.samples}: must be {rows}")
    bar = tqdm(total=len(examples), desc=text, unit="prompt", dynamic_ncols=True)

    def sample(prompts, on_groups):
        rows = sampler.rollout(
            params, config, prompts, group_size=given.samples, max_new_tokens=room,
            temperature=given.temperature, top_k=given.top_k, top_p=given.top_p,
            seed=given.seed, iteration=0, domain="eval", on_groups=on_groups[0],
        )  # fmt: skip
        bar.update(min(batch, bar.total - bar.n))
        return [sampler.ends(rows)[0]]

    with bar, rewards.Scorer(task, recipe, workers=given.workers) as scorer:
        controls = {"samples": given.samples, "width": width, "batch": batch}
        (metrics,) = evaluate(sample, scorer, examples, tokenizer, **controls)
    return {"eval/prompts": len(examples), **metrics}


def _line(text: str, metrics: dict, samples: int) -> str:
    low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    return (
        f"{text}: Pass@1 {metrics['eval/pass_at_1']:.4f} (95% interval {low:.4f} to {high:.4f}; "
        f"mean of {samples} samples of {metrics['eval/prompts']} prompts), "
        f"Pass@{samples} {metrics[f'eval/pass_at_{samples}']:.4f}, "
        f"length {metrics['eval/length_mean']:.1f}"
        + (f", reward {metrics[own]:.4f}" if (own := "eval/reward_function") in metrics else "")
    )


def is_result(content: bytes) -> bool:
    """Whether a file is what ``--out`` writes."""
    return content.startswith(b'{\n "settings": {')


def main(given: cli.Flags) -> None:
    """Evaluate a model directory on the sets that the flags name."""
    if given.out:
        files.check_file(given.out, "--out=", is_result, "an earlier result")
    cli.use_cache(given.compilation_cache)
    config, params = model.hf.load(epath.Path(given.hf).expanduser(), dtype=given.dtype)
    chat = {"chat": given.chat, "system": given.system}
    tokenizer = hf_tokenizer.load(given.hf, vocab_size=config.vocab_size, **chat)
    stop = {"stop_tokens": tokenizer.stop_ids, "pad_token": tokenizer.pad_id}
    config = dataclasses.replace(config, **stop)
    params = sampler.to_sampler(params, config)
    found = {}
    for text in given.task:
        found[text] = _evaluate_set(given, config, params, tokenizer, text)
        print(_line(text, found[text], given.samples), flush=True)
    if given.out:
        results = {"settings": {name: given[name].value for name in RECORDED}, "sets": found}
        files.write_text(files.normal(given.out), json.dumps(results, indent=1))
        print(f"written: {given.out}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
