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
_SOFT = (
    "The scale of the inner argument could not be checked against the paper. Here τ means the "
    "half-width of SAPO's gate at the same τ: κ = 0.4723·τ for erf, 0.5673·τ for arctan, 0.2350·τ "
    "for softsign. Divide τ by the factor for a gate whose κ is τ.",
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
    "sapo_erf": _SOFT,
    "sapo_arctan": _SOFT,
    "sapo_softsign": (*_SOFT, "The gate has a kink in its slope at r = 1."),
    "grpo": (
        *_CLIP,
        "The default of TRL's GRPO trainer is DAPO's averaging (over tokens), verl's as well; "
        "tunix averages per sequence with β = 0.04. Here: per sequence, as in the paper, β = 0.",
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
}
