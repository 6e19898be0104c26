"""Rollouts: prefill once per prompt, completions flow through rows on the device, compaction.

    rollout = rollout(params, config, prompts, group_size=8, max_new_tokens=512, …)

    rollout           samples G completions of each prompt                             engine.py
    ends              lengths of the completions, and how they ended
    partial_rollout   within a budget: what has not ended goes on in the next one      partial.py
    Plan, make_plan   the shapes that a rollout's programs are compiled for            plan.py
    to_sampler        `SamplerParams`: the sampler's dtype and layout; `moved_bytes`   weights.py

Below: what the host decides (scheduler.py), the device's programs (decode.py), their state
(decode_state.py), how it becomes rows (results.py), the draw of a token (sampling.py).
"""

from sapo_jax.sampler.engine import OnGroups, ends, rollout
from sapo_jax.sampler.partial import partial_rollout
from sapo_jax.sampler.plan import Plan, make_plan
from sapo_jax.sampler.results import Begun, none_begun
from sapo_jax.sampler.sampling import with_occurrence
from sapo_jax.sampler.weights import SamplerParams, moved_bytes, to_sampler

__all__ = [
    "Begun", "OnGroups", "Plan", "SamplerParams", "ends", "make_plan", "moved_bytes", "none_begun",
    "partial_rollout", "rollout", "to_sampler", "with_occurrence",
]  # fmt: skip
