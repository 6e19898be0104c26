"""Where public implementations of an algorithm differ, as read in their sources in 2026.

Links to code go stale, so they are named by project; versions are those of July and August 2026.
"""

_CLIP = (
    "The clip is one-sided: A > 0 with r ≪ 1 and A < 0 with r ≫ 1 keep their gradient. With A < 0 "
    "the coefficient grows with r without bound unless dual clip is on.",
    "verl's `vanilla` loss, which many call GRPO, has dual clip on at 3; tunix, NeMo-RL, slime, "
    "AReaL and OpenRLHF have it off, as here; ROLL, where it is on, clips at 1 + 2ε.",
)
_SEQUENCE = (
    "AReaL averages sequence ratios over tokens, which weights sequences by their length, as "
    "LUSPO does; verl ignores the configured aggregation.",
    "verl, tunix and torchforge differentiate the token form and clamp the log-ratio; TRL, "
    "NeMo-RL, ROLL, slime and AReaL differentiate s directly. For an advantage that is constant "
    "in the sequence both have the same gradient, which a test asserts.",
)


def _soft(factor: float, ratio: float) -> tuple[str, ...]:
    return (
        f"Here κ = {factor:.4f}·τ: at any τ the half-width is that of SAPO's gate at the same τ. "
        f"The paper's τ is another unit: τ here = {ratio:.3f}·τ there. Its best, (10, 12) for all "
        f"gates, is `tau_pos={10 * ratio:.2f}`, `tau_neg={12 * ratio:.2f}`, as a test asserts.",
        "The paper adds a constant, so that f(1) = 1; here f(1) = 0. No gradient sees it.",
    )


_DIVERGENCE = (
    "The authors' divergences are of the 20 likeliest tokens, or binary: the sampled token against "
    "all others, as here. They report both as equal.",
    "The paper's π_old is the sampler, whatever the learner makes of the tokens. That is "
    "`learner.old_logp='sampler'`; with 'recompute' it is the learner's, as in their `_recompute`.",
    "Tokens are summed, not averaged over the length (`seq_sum`); verl's script divides by a "
    "constant as well, which is `const_len`. Advantages without a standard deviation, as there: "
    "`advantages='mean'`.",
)
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "sapo": (
        "verl, TRL, Liger, ms-swift and torchforge average per sequence, as the paper; AReaL and "
        "Trinity average over tokens.",
        "verl and torchforge clamp the log-ratio to ±20 before the exponential, as here; the "
        "others do not, and their gradient is NaN in float32 from a log-ratio of 89.",
        "Trinity 0.4.0 uses −A·sg(f)·log π: its coefficient is f and not r·w, twice as large at "
        "r = 1 and growing with r, so that there is no trust region.",
        "Trinity requires τ_neg ≥ τ_pos; here any two are allowed.",
        "All take τ_pos where A > 0 and τ_neg elsewhere.",
    ),
    "sapo_erf": _soft(0.4723, 1.4971),
    "sapo_arctan": _soft(0.5673, 1.7627),
    "sapo_softsign": _soft(0.4348, 2.3000),
    "sapo_softsign_abs": (
        "Formerly `sapo_softsign` here, a name that arXiv 2602.19345 gives to another function. "
        "κ = 0.2350·τ, and the gate has a kink in its slope at r = 1.",
    ),
    "sapo_quadrant": (
        "Not in any paper. The corrective quadrants (A > 0 with r < 1, A < 0 with r > 1) are the "
        "ones that PPO leaves open and SAPO damps: a small τ opens them, "
        "`--config.objective.tau_pos_below=0.1 --config.objective.tau_neg_above=0.1`.",
    ),
    "sapo_sequence": (
        "SAPO's gate on GSPO's ratio; of the frameworks, TRL can combine them. The ratio of a "
        "sequence stays near 1, so that a τ that matters there is larger: GSPO's band is 4e-4.",
    ),
    "grpo": (
        *_CLIP,
        "The default of TRL's GRPO trainer is DAPO's averaging (over tokens), verl's as well; "
        "tunix averages per sequence with β = 0.04. Here: per sequence, as in the paper, β = 0.",
    ),
    "grpo_r2": (
        "The baseline of SAPO's paper: the band of GSPO's, 0.2 and 0.27, and the old policy's "
        'routing replayed (`learner.routing_replay="R2"`, which the name implies) where the model '
        "has experts. Its companion, arXiv 2512.01374, finds R2 unstable from 4 minibatches a "
        "rollout on, the number that SAPO's comparison takes.",
        *_CLIP,
    ),
    "dapo": (
        *_CLIP,
        "The paper averages over the tokens of a prompt's group; frameworks, and this preset, over "
        "those of the whole batch.",
        "TRL's `loss_type='dapo'` changes the average alone: ε_high stays equal to ε.",
        "Dynamic sampling is `batch.oversample`, overlong shaping `reward.overlong` and "
        "`reward.buffer` in a config. The paper draws until the batch is full; here a fixed number "
        "of prompts is drawn, so that shapes do not change, and what is missing is masked.",
    ),
    "dr_grpo": (
        *_CLIP,
        "`max_length` is a constant of the configuration. verl (without `loss_scale_factor`) and "
        "tunix divide by the padded width instead, which changes from batch to batch.",
        "The advantages belong to it: `advantages='mean'`. TRL's `dr_grpo` does not switch the "
        "standard deviation off by itself.",
    ),
    "ppo": (
        *_CLIP,
        "PPO proper has a critic and generalised advantages; here advantages come from groups.",
    ),
    "gspo": (
        *_SEQUENCE,
        "Correcting for the sampler takes the product of ratios, GSPO's mean is geometric: "
        "OpenRLHF puts the sampler's log-probabilities into GSPO's denominator.",
    ),
    "gspo_token": _SEQUENCE,
    "cispo": (
        "The unit of ε_high differs: 1 + ε_high here, in verl, NeMo-RL, AReaL, slime and ROLL; an "
        "absolute cap in TRL, ms-swift and Liger, where 0.28 scales every token down to 0.28.",
        "Defaults differ: verl's example (10, 0.2), AReaL's (1, 4), ROLL's (0.1, 0.1). With "
        "eps_low = 1, as here, there is no lower bound.",
        "ROLL can mask the quadrants that PPO clips; the coefficient stays bounded in the others.",
    ),
    "gmpo": (
        "ε is a distance in log space, ±0.4; verl's `geo_mean` reads its `clip_ratio` so as well, "
        "with a default of 0.2.",
        "In TRL a row without tokens once contributed −A; here it counts nowhere.",
    ),
    "p3o": (
        "Its KL(π_old‖π_θ) is exact in the authors' code, over all actions; here it is estimated "
        "from the sampled tokens by r − 1 − log r.",
        "The name is also that of two unrelated methods (Penalized PPO, pairwise PPO).",
    ),
    "reinforce": (
        "Averaging differs: verl's `reinforce` sums over tokens and averages over sequences "
        "(`seq_sum`); here the default is per sequence.",
        "Without a stop-gradient on an importance weight, automatic differentiation adds log π·∇v.",
    ),
    "maspo": (
        "A < 0 with r > 1 and A > 0 with r < 1 have no gate. The widths are held to the ranges of "
        "the authors' code, which its paper does not state.",
    ),
    "mhpo": (
        "The coefficient at r = 1 is 0.265: compared at the same learning rate it takes smaller "
        "steps. `mhpo_unit` takes that out.",
    ),
    "mhpo_unit": ("`mhpo` divided by its coefficient at r = 1; not in the paper.",),
    "vespo": (
        "(k, λ) are those of the authors' code, (2, 3) and (3, 2); its docstring has others.",
        "The authors take the sign of the first token's advantage, which fails where that token is "
        "masked; here every token's own.",
        "TRL bounds log W from below by log 1e-8; here by −20, as the authors' code.",
    ),
    "luspo": (
        "GSPO summed instead of averaged over tokens: the gradient grows with the length, so "
        "compare at the same gradient norm.",
    ),
    "topr": (
        "The paper writes rewards of ±1 in place of A; with a baseline, the sign is A's, as in "
        "Trinity. `low` and `high` are its limits a and b.",
        "W is the product over the sequence, as in the paper and in Trinity; an open change to "
        "verl takes the geometric mean.",
    ),
    "dppo_tv": (
        *_DIVERGENCE,
        "The authors' code also caps r, at 10 or 10,000; here r is bounded by e^20 alone.",
    ),
    "dppo_kl": (
        *_DIVERGENCE,
        "The authors' code also caps r, at 10 or 10,000; here r is bounded by e^20 alone.",
    ),
    "cppo": (
        *_DIVERGENCE,
        "δ_b is a constant here, as the paper has it for a policy that is trained already (0.015, "
        "with δ = 0.15 for dense models and 0.2 for 30B-A3B). For base models it takes the 90th "
        "percentile of a sequence's D, between 1 and 2 times a least value.",
        "A sequence's length and places count the tokens under the mask.",
    ),
}
# What the pages do not have, and why: a formula is taken from its authors, or not at all.
LEFT_OUT = {
    "SSPO (arXiv 2602.19327)": "its text could not be had; what others write of it differs.",
    "R²VPO (arXiv 2605.26784)": "its text could not be had beyond the abstract.",
    "MiniRL (arXiv 2512.01374)": (
        "its equations were read at second hand only. By what is said of it (token ratios, PPO's "
        "clip, no length normalisation, the sampler corrected for by token) these fields make it: "
        "`objective.name=grpo`, `objective.aggregation=seq_sum`, `correction.name=token_tis`, "
        "`learner.old_logp=recompute`, `learner.routing_replay=R2` or `R3`."
    ),
    "Clip-Cov (arXiv 2505.22617)": (
        "it silences tokens drawn at random from those whose (A − mean)·(log π − mean), with means "
        "of the whole batch, lies in a range. The loss would depend on the draw and on how a "
        "minibatch is cut into micro-batches, which none here does (in verl it does)."
    ),
}
