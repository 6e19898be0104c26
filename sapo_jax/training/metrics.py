"""Every key of the records in metrics/part-*.jsonl; docs/metrics.md is written from it.

A test compares the table with what runs write: a new key needs a row here.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A row of the table.

    Args:
      meaning: in a line.
      unit: "" is a number without one.
      healthy: what a run that goes well shows, where that can be said.
      when: the fields that write it; "" is every run.
    """

    meaning: str
    unit: str = ""
    healthy: str = ""
    when: str = ""


_PASS = (
    "unbiased Pass@k of held-out prompts, for k = 1 and all samples; with evals, for k = 1, the "
    "mean of theirs, or that of the one that eval.best names",
    "share",
    "rises",
)
_LOW = (
    "lower end of its 95% interval over prompts: bootstrap, or Wilson's where all are 0 or 1",
    "share",
)
_HIGH = ("upper end of that interval", "share")

# By what writes them. <task> stands for a name in config.tasks, <name> for one in config.evals,
# <k> for a number.
_ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "iteration": ("number of rollouts; 0 is the evaluation before the first",),
        "update": ("number of optimizer steps",),
        "learning_rate": ("mean over the iteration's updates",),
        "update/skipped": ("updates not made, since a number was not finite", "", "0"),
        "minibatch": (
            "list: what is under policy/, ratio/, coefficient/ and grad/, of each update; where it "
            "was skipped, update/nonfinite is the first that was not finite",
        ),
        "length/mean": ("mean length of a completion, with its stop token", "tokens"),
        "data/dropped": ("examples so far whose prompt was too long", "", "0"),
        "policy/loss": ("the loss; where ratios are in it, no measure of progress",),
        "policy/entropy": ("mean entropy of the next token", "nats", "falls slowly, stays above 0"),
        "policy/ratio_max": ("largest π_θ/π_old, at the objective's level", "", "below 10"),
        "policy/ratio_min": ("smallest π_θ/π_old", "", "above 0.1"),
        "policy/gate_mean": (
            "mean weight w = c/r of tokens with A ≠ 0, where c multiplies A·∇log π",
            "",
            "near 1 for SAPO",
        ),
        "policy/clipped": ("share of those tokens with c = 0", "share", "0 for SAPO"),
        "policy/eur": (
            "effective update ratio: w over the tokens of a prompt with A ≠ 0, then over prompts; "
            "for clips 1 − the share that is silenced (arXiv 2602.19345)",
            "",
            "0.9 to 1; falls with staleness",
        ),
        "policy/eur_pos": ("the same over tokens with A > 0", "", "as policy/eur"),
        "policy/eur_neg": ("the same over tokens with A < 0", "", "as policy/eur"),
        "policy/log_ratio_clipped": ("share of tokens with |log r| over 20", "share", "0"),
        "policy/kl_old": ("mean r − 1 − log r, estimates KL(π_old‖π_θ)", "nats", "below 0.01"),
        "ratio/var_mean": (
            "mean over sequences of Var_i, the variance of log π_θ/π_old over a sequence's tokens",
            "nats²",
            "below 0.02; the paper's most frequent: 0.001 dense, 0.004 sparse",
        ),
        "ratio/var_p50": ("median of Var_i, to 5%", "nats²", "below the mean"),
        "ratio/var_p99": ("99th percentile of Var_i, to 5%", "nats²", "below 0.02"),
        "ratio/d_log_mean": (
            "mean of D_i = |mean of g(log r) − g(mean of log r)|, g(z) = sech²(τz/2): how far a "
            "sequence's gates are from one gate of the sequence; never above the bound",
            "",
            "below 0.001",
        ),
        "ratio/d_log_p99": ("99th percentile of it, to 5%", "", "below 0.005"),
        "ratio/d_gate_mean": (
            "the same with the gate in use, g(r − 1), which has no such bound",
            "",
            "near ratio/d_log_mean",
        ),
        "ratio/d_gate_p99": ("99th percentile of it, to 5%", "", "near ratio/d_log_p99"),
        "ratio/bound_mean": ("mean of the bound τ²/4 · Var_i", "", "a quarter of ratio/var_mean"),
        "ratio/bound_broken": (
            "share of sequences where D_i with the gate in use is above the bound",
            "share",
            "near 0; rises where log r ≈ r − 1 no longer holds",
        ),
        "ratio/ess": (
            "effective share of tokens by their ratios, (Σr)²/(n·Σr²)",
            "share",
            "above 0.95; 1 on-policy",
        ),
        "ratio/log_p01": ("1st percentile of log π_θ/π_old over tokens, to 5%", "nats", "-0.2"),
        "ratio/log_p50": ("median of it", "nats", "0"),
        "ratio/log_p99": ("99th percentile of it", "nats", "0.2"),
        "coefficient/pos_below": (
            "share of Σ|c·A| of tokens with A > 0 and r < 1, at the objective's level; the four "
            "add up to 1 but for tokens at r = 1",
            "share",
            "below coefficient/pos_above",
        ),
        "coefficient/pos_above": ("… with A > 0 and r > 1", "share", "the update has its way"),
        "coefficient/neg_below": ("… with A < 0 and r < 1", "share", "the update has its way"),
        "coefficient/neg_above": (
            "… with A < 0 and r > 1",
            "share",
            "does not grow: PPO has no bound here",
        ),
        "grad/norm": ("norm of the gradient before it is clipped", "", "no spikes"),
        "grad/update_norm": ("norm of the change of the parameters",),
        "sampler/logp_gap_mean": (
            "mean |log π_learner − log π_sampler| in the first update",
            "nats",
            "f32 ≤ 1e-5, bf16 ≤ 0.02",
        ),
        "sampler/logp_gap_max": (
            "largest such gap",
            "nats",
            "f32 ≤ 1e-4: of unlikely tokens",
        ),
        "histogram/log_ratio_pos": ("edges and counts of log r of tokens with A > 0",),
        "histogram/log_ratio_neg": ("the same for A < 0",),
        "histogram/gate_pos": ("edges and counts of the weight w of tokens with A > 0",),
        "histogram/gate_neg": ("the same for A < 0",),
        "histogram/ratio": ("edges and counts of π_θ/π_old of tokens, from 0.4 to 1.6",),
        "time/startup": (
            "restoring, compiling, evaluation before training; in the first record of a start",
            "s",
        ),
        "time/iteration": ("from drawing prompts through the last update", "s"),
        "time/rollout": ("sampling; with source=demonstrations, reading", "s"),
        "time/update": ("optimizer updates, alone", "s"),
        "time/tokens_per_second": ("completion tokens ÷ time/iteration", "tokens/s"),
    },
    "source=rollout": {
        "run/collapsed_at": (
            "iteration since which the run is down by collapse.rule, without a break: the mean "
            "accuracy of collapse.window iterations below collapse.reward times its best so far "
            "(that is collapse.least or more), or the mean entropy below collapse.entropy times "
            "its first; 0: it is not",
            "iteration",
            "0",
        ),
        "reward/mean": ("mean reward of the completions", "", "rises"),
        "reward/std": ("standard deviation of the rewards", "", "not 0"),
        "reward/accuracy": ("mean verdict of the task", "0 to 1", "rises"),
        "advantage/zero_groups": (
            "share of prompts whose completions all have one reward: they teach nothing",
            "share",
            "not near 1",
        ),
        "policy/age_mean": (
            "how many iterations older than the policy those are that sampled the tokens, in the "
            "mean",
            "iterations",
            "0; with staleness, that number",
        ),
        "policy/stale": ("share of tokens that an earlier iteration's policy sampled", "share"),
        "histogram/age": (
            "edges and counts of tokens by that age, from 0 to 16 iterations or more",
        ),
        "length/max": ("length of the longest completion", "tokens"),
        "length/truncated": ("share of completions that ran out of room", "share", "near 0"),
        "sampler/rows_per_token": (
            "rows computed in decode steps ÷ completion tokens: 1 if none is idle",
            "",
            "1 to 1.5",
        ),
        "sampler/weights_moved_bytes": ("parameters sent between devices to sample", "bytes"),
        "time/logp": ("making minibatches: scoring log π_old and log π_ref, advantages", "s"),
        "time/to_sampler": ("moving parameters to the sampler", "s"),
        "time/score": ("judging, added up over threads", "s"),
        "time/score_exposed": ("waiting for verdicts", "s", "near 0"),
    },
    "sampler.budget": {
        "sampler/goes_on": (
            "share of prompts with a completion that has not ended, which goes on in the next "
            "rollout; the metrics of rewards and lengths are of the others",
            "share",
            "well below 1",
        )
    },
    "sampler.devices": {
        "time/overlap": ("of time/rollout, what passed during time/update, on other devices", "s")
    },
    "reward.function": {"reward/function": ("mean of the reward function", "", "rises")},
    "an evaluation, reward.function": {
        "eval/reward_function": ("its mean over held-out completions", "", "rises")
    },
    "reward.format": {
        "reward/format": ("share with a thought in its tags, then an answer", "share", "to 1")
    },
    "reward.overlong": {"reward/overlong": ("mean penalty on length", "−1 to 0", "to 0")},
    "reward.repetition": {
        "reward/repetition": ("minus the mean share of repeated n-grams", "−1 to 0", "near 0")
    },
    "reward.language": {
        "reward/language": (
            "minus the mean share of letters in other writing systems than the prompt's",
            "−1 to 0",
            "0",
        )
    },
    "objective.kl_coef or reward.kl_coef": {
        "policy/kl_ref": ("mean KL(π_θ‖π_ref) of a token", "nats", "rises slowly"),
        "reward/kl": ("mean over completions of Σ KL(π_old‖π_ref)", "nats", "rises slowly"),
    },
    "batch.oversample": {
        "advantage/kept_groups": (
            "share of the batch filled with prompts whose rewards differ",
            "share",
            "1; if less, draw more",
        )
    },
    "correction.name": {
        "correction/rho_mean": ("mean ρ = π_old/π_sampler", "", "near 1"),
        "correction/weight_mean": ("mean weight of a token", "", "near 1"),
        "correction/cut": ("share of tokens truncated or rejected", "share", "near 0"),
        "correction/ess": ("effective share of tokens (Σw)²/(n·Σw²)", "share", "near 1"),
    },
    "a model with experts": {
        "router/entropy": ("mean entropy of the routers", "nats", "not near 0"),
        "router/load_max": ("load of the busiest expert ÷ mean load", "", "well below E/k"),
        "router/unused": ("share of experts that no token chose", "share", "near 0"),
    },
    "a model with experts, source=rollout": {
        "router/differs": (
            "share of (layer, token) that now chooses other experts than were recorded",
            "share",
            "near 0",
        )
    },
    "objective.schedule": {
        "objective/<field>": ("value of a hyperparameter in config.objective.end", "", "as planned")
    },
    "learner.router_aux_coef": {"router/balance": ("load-balancing loss times its weight",)},
    "an evaluation": {
        "eval/pass_at_<k>": _PASS,
        "eval/pass_at_<k>_low": _LOW,
        "eval/pass_at_<k>_high": _HIGH,
        "eval/length_mean": ("mean length of a held-out completion", "tokens"),
    },
    "an evaluation, tasks": {
        "eval/<task>/pass_at_<k>": ("the same for one task of a mixture", "share", "rises"),
        "eval/<task>/pass_at_<k>_low": _LOW,
        "eval/<task>/pass_at_<k>_high": _HIGH,
    },
    "an evaluation, evals": {
        "eval/<name>/pass_at_<k>": ("Pass@k of one of several evaluations", "share", "rises"),
        "eval/<name>/pass_at_<k>_low": _LOW,
        "eval/<name>/pass_at_<k>_high": _HIGH,
        "eval/<name>/length_mean": ("mean length of its completions", "tokens"),
    },
    "tasks": {"reward/<task>": ("mean reward of one task of a mixture", "", "rises")},
    "eval.every": {"time/eval": ("evaluation", "s")},
    "checkpoint.every": {"time/checkpoint": ("saving the iteration before this one", "s")},
    "sapo_jax.evaluate": {"eval/prompts": ("number of prompts",)},
}
METRICS = {
    key: Metric(*row, when=when) for when, rows in _ROWS.items() for key, row in rows.items()
}
