"""Pass@1 and Pass@k on fixed held-out sets, with bootstrap intervals over prompts.

``python -m sapo_jax.evaluate --hf=DIR --task=NAME,option=value…`` evaluates a model directory.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from sapo_jax import model, rewards, sampler, tasks
from sapo_jax.data import encode, hf_tokenizer, stream
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example
from sapo_jax.types import Rollout

RESAMPLES = 2000


def pass_at_k(correct_P: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased Pass@k of each prompt: 1 − C(n − c, k) / C(n, k).

    Source: arXiv 2107.03374, Eq. 1.

    Args:
      correct_P: i[P], correct completions c among the samples.
      samples: n per prompt.
      k: in 1..n.

    Returns:
      f64[P]; for k = 1 the share of correct completions.

    Raises:
      ValueError: k is not in 1..n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must be in 1..{samples}, the samples of a prompt")
    total = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(c), k) / total for c in correct_P])


def interval(values_P: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (Efron 1979), with a fixed seed."""
    draws = np.random.default_rng(0).integers(0, len(values_P), (RESAMPLES, len(values_P)))
    means = values_P[draws].mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(correct_PN: np.ndarray) -> dict[str, float]:
    """Metrics of a table of verdicts, bool[P, n]: Pass@1 as the mean over samples, and Pass@n."""
    samples = correct_PN.shape[1]
    metrics = {}
    for k in sorted({1, samples}):
        values_P = pass_at_k(correct_PN.sum(-1), samples, k)
        low, high = interval(values_P)
        metrics |= {
            f"eval/pass_at_{k}": float(values_P.mean()),
            f"eval/pass_at_{k}_low": low,
            f"eval/pass_at_{k}_high": high,
        }
    return metrics


def evaluate(
    sample: Callable[..., Rollout],
    scorer: rewards.Scorer,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    samples: int,
    width: int,
    batch: int,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of a policy on held-out examples.

    Args:
      sample: ``sample(prompts, on_groups=…)`` draws ``samples`` completions of each of ``batch``
        prompts, as `sampler.rollout` does.
      scorer: judges while the next are drawn; correct is what has an accuracy of 1.
      examples: the evaluation set; the last batch is filled up with its own examples.
      tokenizer: of the policy.
      samples: completions per prompt.
      width: tokens of room for a prompt.
      batch: prompts sampled at a time.
      names: of the tasks that ``Example.task`` counts, for metrics of each of them.

    Returns:
      ``eval/pass_at_1``, ``eval/pass_at_<samples>``, each with ``_low`` and ``_high``, and
      ``eval/length_mean``; with names, ``eval/<name>/pass_at_1`` and so on too.
    """
    judged, lengths = [], []
    for start in range(0, len(examples), batch):
        real = list(examples[start : start + batch])
        filled = (real * batch)[:batch]
        groups = rewards.Groups(scorer, filled, tokenizer)
        rows = sample(encode.encode_prompts(filled, tokenizer, width), on_groups=groups)
        judged.append((groups, len(real)))
        lengths.append(sampler.ends(rows)[0].reshape(batch, samples)[: len(real)])
    correct_PN = np.array(
        [
            verdict.parts["accuracy"] == 1
            for groups, real in judged
            for verdict in groups.wait()[: real * samples]
        ]
    ).reshape(-1, samples)
    metrics = summarise(correct_PN)
    task_P = np.array([example.task for example in examples])
    for k, name in enumerate(names):
        if (task_P == k).any():
            own = summarise(correct_PN[task_P == k])
            metrics |= {key.replace("eval/", f"eval/{name}/"): x for key, x in own.items()}
    return metrics | {"eval/length_mean": float(np.concatenate(lengths).mean())}


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "name,option=value,…"; a value that is no Python literal is a string.

    Raises:
      ValueError: an option without a value.
    """
    name, *pairs = re.split(r",(?=\w+(?:=|$))", text)
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--task={text}: {pair!r} must be option=value")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


def _evaluate_set(given: Any, config: model.ModelConfig, params: Any, tokenizer, text: str) -> dict:
    """Metrics of one evaluation set."""
    from tqdm import tqdm

    name, options = parse_task(text)
    task = tasks.make(name, **options)
    width, room = given.max_prompt_tokens, given.max_new_tokens
    fits = stream.Fits(tokenizer, width)
    examples = list(encode.distinct(task.examples("test"), given.prompts, keep=fits))
    if not examples:
        raise ValueError(f"--task={text}: no prompt fits --max_prompt_tokens={width}")
    batch = min(given.batch, len(examples))
    bar = tqdm(total=len(examples), desc=text, unit="prompt", dynamic_ncols=True)

    def sample(prompts, **kw):
        rows = sampler.rollout(
            params, config, prompts, group_size=given.samples, max_new_tokens=room,
            temperature=given.temperature, top_k=given.top_k, top_p=given.top_p,
            seed=given.seed, iteration=0, domain="eval", **kw,
        )  # fmt: skip
        bar.update(min(batch, bar.total - bar.n))
        return rows

    with bar, rewards.Scorer(task, workers=given.workers) as scorer:
        controls = {"samples": given.samples, "width": width, "batch": batch}
        metrics = evaluate(sample, scorer, examples, tokenizer, **controls)
    return {"eval/prompts": len(examples), **metrics}


def _line(text: str, metrics: dict, samples: int) -> str:
    low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    return (
        f"{text}: Pass@1 {metrics['eval/pass_at_1']:.4f} (95% interval {low:.4f} to {high:.4f}; "
        f"mean of {samples} samples of {metrics['eval/prompts']} prompts), "
        f"Pass@{samples} {metrics[f'eval/pass_at_{samples}']:.4f}, "
        f"length {metrics['eval/length_mean']:.1f}"
    )


def main(argv: Sequence[str]) -> None:
    """Evaluate a model directory on the sets that the flags name."""
    from absl import flags

    given = flags.FLAGS
    if len(argv) > 1 or not given.hf or not given.task:
        sys.exit("error: expected --hf=DIR and --task=NAME,option=value…, once or more")
    try:
        config, params = model.hf.load(epath.Path(given.hf).expanduser(), dtype=given.dtype)
        chat = {"chat": given.chat, "system": given.system}
        tokenizer = hf_tokenizer.load(given.hf, vocab_size=config.vocab_size, **chat)
        stop = {"stop_tokens": tokenizer.stop_ids, "pad_token": tokenizer.pad_id}
        config = dataclasses.replace(config, **stop)
        params = sampler.to_sampler(params, config)
        of_set = partial(_evaluate_set, given, config, params, tokenizer)
        found = {}
        for text in given.task:
            found[text] = of_set(text)
            print(_line(text, found[text], given.samples), flush=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.out:
        settings = {name: given[name].value for name in FLAGS}
        epath.Path(given.out).write_text(
            json.dumps({"settings": settings, "sets": found}, indent=1)
        )
        print(f"written: {given.out}")


FLAGS = (
    "hf", "prompts", "samples", "temperature", "top_k", "top_p", "max_prompt_tokens",
    "max_new_tokens", "seed", "dtype", "chat", "system",
)  # fmt: skip

if __name__ == "__main__":
    from absl import app, flags

    flags.DEFINE_string("hf", "", "Hugging Face directory of the policy.")
    flags.DEFINE_multi_string("task", [], "NAME,option=value,… of a set; may be repeated.")
    flags.DEFINE_integer("prompts", 512, "At most this many prompts of the test split.", 1)
    flags.DEFINE_integer("samples", 16, "Completions per prompt.", 1)
    flags.DEFINE_float("temperature", 1.0, "Of sampling; 0 is greedy.", 0.0)
    flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.", 1)
    flags.DEFINE_float("top_p", None, "Keep the smallest set of this probability.", 0.0, 1.0)
    flags.DEFINE_integer("max_prompt_tokens", 512, "Longer prompts are left out.", 1)
    flags.DEFINE_integer("max_new_tokens", 1024, "Room for a completion.", 1)
    flags.DEFINE_integer("batch", 8, "Prompts that are sampled at a time.", 1)
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.", 0)
    flags.DEFINE_integer("workers", 1, "Rows judged at a time, while the device works.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of everything.")
    flags.DEFINE_bool("chat", True, "Prompts by the directory's chat template.")
    flags.DEFINE_string("system", "", "System message of each prompt.")
    flags.DEFINE_string("out", "", "JSON file for the results.")
    app.run(main)
