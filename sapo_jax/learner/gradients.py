"""The gradient of the loss of a minibatch, and what is measured on the way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sapo_jax import masked, model, objectives
from sapo_jax.learner import diagnostics, images, scores
from sapo_jax.learner.optimizer import Hyperparameters
from sapo_jax.model import head, lora, routing
from sapo_jax.parallel import collectives
from sapo_jax.types import Batch, Frozen, Images, Weighted


def _per_token(batch: Batch, hp: Hyperparameters) -> dict[str, jax.Array]:
    """What the loss of each token needs besides its log π, [T]."""
    mask_BS = batch.mask
    divisor_BS = objectives.divisors(hp.objective, mask_BS, batch.segments, jnp.float32)
    arrays = {
        "old_logp": batch.old_logp,
        "advantages": batch.token_advantages,
        "mask": mask_BS,
        "ref_logp": batch.ref_logp,
        "weights": batch.weights,
        "divisor": jnp.where(mask_BS, divisor_BS, 1),
    }
    return {name: x.reshape(-1) for name, x in arrays.items() if x is not None}


def _token_losses(kl: str, logp_T: jax.Array, per_token: tuple[dict, Any]) -> jax.Array:
    own, objective = per_token
    losses_T = objectives.token_losses(
        objective, logp_T, own["old_logp"], own["advantages"], own["mask"],
        ref_logp_T=own.get("ref_logp"), kl=kl, weights_T=own.get("weights"),
    )  # fmt: skip
    return losses_T / own["divisor"]


def _loss_terms(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[dict[str, Any], routing.Summary | None]:
    arguments, summary = scores.head_arguments(params, batch, hp)
    by_token = objectives.by_token(hp.objective)
    if by_token:
        loss = partial(_token_losses, hp.static.kl)
        per_token = _per_token(batch, hp), hp.objective
        numerator, *found = head.token_loss(loss, per_token, *arguments)
        found = jax.lax.stop_gradient(found)
    else:
        found = head.logp_entropy(*arguments)
    logp_BS, entropy_BS = (x.reshape(batch.tokens.shape) for x in found)
    terms = objectives.policy_terms(
        hp.objective, logp_BS, batch.old_logp, batch.advantages, batch.mask,
        ref_logp_BT=batch.ref_logp, kl=hp.static.kl,
        weights_BT=batch.weights, segments_BT=batch.segments,
    )  # fmt: skip
    if by_token:  # the same sum, whose gradient is known already
        terms["loss"] = terms["loss"].replace(numerator=numerator)
    logp_BS, entropy_BS = jax.lax.stop_gradient((logp_BS, entropy_BS))
    terms["policy/entropy"] = masked.mean(entropy_BS, batch.mask)
    terms["nonfinite"] = diagnostics.nonfinite(logp_BS, batch)
    if summary is not None:
        terms |= routing.terms(summary, scores.counts(batch), batch.routing)
    return terms | diagnostics.token_terms(hp.objective, logp_BS, batch), summary


def _balance(params: Any, micros: scores.MicroBatches, hp: Hyperparameters):
    """The load-balancing loss of a micro-batch as a function of its summary, or None.

    Its fractions are those of the whole minibatch, hence one more forward pass; its sum is scaled
    so that dividing by the policy loss's denominator makes it a mean over tokens.
    """
    if hp.router_aux_coef is None or not hp.static.model.num_experts:
        return None

    def forward_only(micro):
        terms, _ = _loss_terms(params, micro, hp)
        return {key: terms[key] for key in ("loss", "router/load", "router/entropy")}

    totals = collectives.merge(jax.lax.stop_gradient(scores.total(forward_only, micros)))
    share_LE = masked.ratio(totals["router/load"])
    layers = share_LE.shape[0]
    tokens = totals["router/entropy"].denominator / layers
    scale = masked.ratio(Weighted(totals["loss"].denominator.astype(jnp.float32), tokens))
    return lambda summary: hp.router_aux_coef * scale * routing.balance(summary, share_LE, layers)


def gradient(
    params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None = None
) -> tuple[Any, dict[str, Any]]:
    """Gradient of the loss and the merged terms of a minibatch, accumulated over micro-batches.

    Numerators and denominators add up, over micro-batches and devices, and are divided once: the
    split changes nothing.
    """
    sums, terms = numerators(params, batch, hp, frozen)
    return divided(sums, terms), terms


def divided(sums: Any, terms: dict[str, Any]) -> Any:
    """The gradient of `numerators`' sums."""
    count = terms["loss"].denominator
    return jax.tree.map(lambda g: masked.ratio(Weighted(g, count.astype(g.dtype))), sums)


def numerators(
    params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None
) -> tuple[Any, dict[str, Any]]:
    """Gradient of the loss's numerator and the merged terms of a minibatch."""
    config = hp.static.model
    specs = lora.trained(model.params.partition_specs(config), config)
    batch = images.with_prompt(batch)
    return scores.shard_map(_gradient, hp, (specs, PartitionSpec()))(params, batch, hp, frozen)


def _gradient(
    params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None
) -> tuple[Any, dict[str, Any]]:
    config, tower = hp.static.model, {n: x for n, x in params.items() if n == "vision"}
    learns = isinstance(batch.images, Images) and bool(tower)
    if learns:  # the tower's part of the gradient is computed once, behind all micro-batches

        def look(tower):
            seen = images.look(tower, config, batch)
            return seen.features, seen

        _, pull, seen = jax.vjp(look, tower, has_aux=True)
        params = {n: x for n, x in params.items() if n != "vision"}
    else:
        seen = images.look(lora.join(params, frozen, hp.lora_scale), config, batch)
    batch = batch.replace(images=seen)
    micros = scores.micro_batches(batch, hp)
    balance = _balance(lora.join(params, frozen, hp.lora_scale), micros, hp)

    def numerator(learnt, micro):
        params, features = learnt
        if learns:
            micro = micro.replace(images=seen.replace(features=features))
        policy = lora.join(params, frozen, hp.lora_scale)
        terms, summary = _loss_terms(policy, micro, hp)
        if balance is not None:
            extra = balance(summary)
            loss = terms["loss"]
            terms["loss"] = loss.replace(numerator=loss.numerator + extra)
            terms["router/balance"] = loss.replace(numerator=extra)
        return terms["loss"].numerator, terms

    learnt, grad = (params, seen.features if learns else None), jax.grad(numerator, has_aux=True)
    (grads, of_features), terms = scores.total(lambda micro: grad(learnt, micro), micros)
    grads = grads | pull(of_features)[0] if learns else grads
    grads = model.params.psum_gradients(grads, config)
    terms = routing.finish_load(collectives.merge(terms))
    return grads, terms
