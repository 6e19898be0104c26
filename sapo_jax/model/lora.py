"""Low-rank adapters (LoRA, arXiv 2106.09685): x·W + (x·A)·B, with W frozen.

Adapters are entries of the parameter table beside the projections that they adapt, so that the
layer, the scan, meshes and the sampler treat them like any other parameter. A policy is then what
is `trained`, the adapters, and what is `frozen`, the base, which is held once; `join` makes of them
what the model's functions take. A vision tower that is not learnt is `frozen`, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model.attention import dense, einsum
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.grouped import grouped_matmul
from sapo_jax.parallel import collectives
from sapo_jax.types import Frozen

A, B = "_lora_a", "_lora_b"  # ends of the names of the two factors
KINDS = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "experts": ("experts_gate", "experts_up", "experts_down"),
}
SUMMED = ("o", "down", "experts_down")  # their inputs are split over `tensor`, others' outputs


def is_adapter(name: str) -> bool:
    """Whether a parameter of a layer is a factor of an adapter."""
    return name.endswith((A, B))


def targets(wanted: Iterable[str], table: Mapping[str, Any]) -> tuple[str, ...]:
    """The projections of a table of layers that some names mean; all of them if there is no name.

    A projection has its own name (``q``, ``experts_gate``), that of Hugging Face (``q_proj``), in
    which experts share those of the MLP, and that of its kind in KINDS.

    Raises:
      ValueError: a name that means none.
    """
    meaning: dict[str, list[str]] = {}
    for kind, projections in KINDS.items():
        for name in (p for p in projections if p in table):
            bare = name.removeprefix("experts_")
            for alias in dict.fromkeys((name, bare, f"{bare}_proj", kind)):
                meaning.setdefault(alias, []).append(name)
    for name in wanted:
        if name not in meaning:
            kinds = [kind for kind in KINDS if kind in meaning]
            has = ", ".join(name for kind in kinds for name in meaning[kind])
            raise ValueError(f"{name!r} is no projection; there are {has}; or {', '.join(kinds)}")
    found = {name for alias in wanted or meaning for name in meaning[alias]}
    return tuple(name for name in table if name in found)


def adapters(table: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The specs of the adapters of a table of layers, always in f32.

    A is drawn with variance 1/(3·inputs), as `peft` does; B is 0: the first policy is the base.
    """
    found = {}
    for name in targets(config.lora_targets, table) if config.lora_targets else ():
        spec, rank = table[name], config.lora_rank
        first = spec.axes[:1] == ("experts",)  # a factor for each expert
        sizes = [math.prod(spec.shape[first:i]) for i in range(len(spec.shape))]
        cut = sizes.index(spec.fan_in, first)  # inputs stand before, outputs behind
        hf_name = spec.hf_name.removesuffix("weight")
        found[name + A] = dataclasses.replace(
            spec, shape=(*spec.shape[:cut], rank), axes=(*spec.axes[:cut], "lora"),
            hf_name=f"{hf_name}lora_A.weight", scale=1 / math.sqrt(3), dtype="float32",
        )  # fmt: skip
        found[name + B] = dataclasses.replace(
            spec, shape=(*spec.shape[:first], rank, *spec.shape[cut:]),
            axes=(*spec.axes[:first], "lora", *spec.axes[cut:]),
            hf_name=f"{hf_name}lora_B.weight", fan_in=rank, scale=0.0, dtype="float32",
        )  # fmt: skip
    return found


def trained(tree: Any, config: ModelConfig) -> Any:
    """The part that is learnt of a tree with the structure of the parameters: all, or adapters."""
    if config.lora_rank:
        return {"layers": {n: x for n, x in tree["layers"].items() if is_adapter(n)}}
    return {n: x for n, x in tree.items() if n != "vision"} if config.freezes else tree


def frozen(tree: Any, config: ModelConfig) -> Frozen | None:
    """The other part."""
    if not config.freezes:
        return None
    if not config.lora_rank:
        return Frozen({"vision": tree["vision"]})
    layers = {n: x for n, x in tree["layers"].items() if not is_adapter(n)}
    return Frozen({**tree, "layers": layers})


def scaled(adapters: Any, scale: jax.Array | float) -> Any:
    """Adapters with alpha/rank in their factors B."""
    layers = {n: x * scale if n.endswith(B) else x for n, x in adapters["layers"].items()}
    return {**adapters, "layers": layers}


def join(trained: Any, frozen: Frozen | None, scale: jax.Array | float | None) -> Any:
    """The parameters of a policy, the factors B times ``scale`` (alpha/rank; None: as they are)."""
    if frozen is None:
        return trained
    own = trained if scale is None else scaled(trained, scale)
    layers = {**frozen.params.get("layers", {}), **own["layers"]}
    return {**frozen.params, **own, "layers": layers}


def base(config: ModelConfig) -> ModelConfig:
    """The shape with nothing frozen: without adapters, and with a tower that is learnt."""
    return dataclasses.replace(config, lora_rank=0, lora_targets=(), train_vision=True)


@jax.jit
def merge(params: Any) -> Any:
    """The parameters of a policy with W + A·B in the place of W, A and B."""
    layers = dict(params["layers"])
    for name in [n.removesuffix(A) for n in layers if n.endswith(A)]:
        weight, a, b = layers[name], layers.pop(name + A), layers.pop(name + B)
        lead = a.shape[: 1 + name.startswith("experts_")]
        factors = a.reshape(*lead, -1, a.shape[-1]), b.reshape(*lead, b.shape[len(lead)], -1)
        change = einsum("...dr,...rf->...df", *factors).reshape(weight.shape)
        layers[name] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
    return {**params, "layers": layers}


def copy_to_tensor(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights of a layer, with the sum over `tensor` in the gradient of factors that lie whole.

    Of an adapter's factors the one that shares the split axis of its projection is split, too.
    """
    return {
        name: collectives.copy_to_tensor(x) if _lies_whole(name) else x
        for name, x in weights.items()
    }


def _lies_whole(name: str) -> bool:
    projection, factor = name[: -len(A)], name[-len(A) :]
    return factor == (B if projection in SUMMED else A)


def linear(weights: dict[str, jax.Array], name: str, x: jax.Array, inputs: int = 1) -> jax.Array:
    """x·W, and with an adapter + (x·A)·B; ``inputs`` axes of x are contracted."""
    out = dense(x, weights[name], inputs)
    if name + A in weights:
        out = out + dense(dense(x, weights[name + A], inputs), weights[name + B])
    return out


def factors(weights: dict[str, jax.Array], name: str, dtype: Any) -> tuple[jax.Array, ...]:
    """The matrices of experts for `grouped`: W, or W, A and B."""
    names = (name, name + A, name + B)
    return tuple(weights[n].astype(dtype) for n in names if n in weights)


def grouped(
    factors: tuple[jax.Array, ...], x_MD: jax.Array, expert: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """As `linear`, each expert's rows by its own matrices; see `grouped_matmul`."""
    weight, *adapter = factors
    out = grouped_matmul(x_MD, weight, expert, sizes_E)
    if adapter:
        for matrix in adapter:
            x_MD = grouped_matmul(x_MD, matrix, expert, sizes_E)
        out = out + x_MD
    return out
