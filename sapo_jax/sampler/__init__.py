"""Rollouts: prefill once per prompt, decode groups in slots on the device, refill, shrink.

`rollout` samples; `to_sampler` gives parameters in the sampler's dtype and layout; a `Plan` has
the shapes that its programs are compiled for.
"""

from sapo_jax.sampler.engine import OnGroups, check, ends, rollout
from sapo_jax.sampler.scheduler import Plan, make_plan
from sapo_jax.sampler.weights import SamplerParams, moved_bytes, to_sampler

__all__ = [
    "OnGroups", "Plan", "SamplerParams", "check", "ends", "make_plan", "moved_bytes", "rollout",
    "to_sampler",
]  # fmt: skip
