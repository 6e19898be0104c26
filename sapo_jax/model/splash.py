"""Splash attention for TPU: grouped-query attention without a scores buffer (Pallas)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128  # rows and head dimensions come in multiples of it
SAVED = "attention"  # name of what the backward pass keeps, for `jax.checkpoint` policies


def padded(rows: int) -> int:
    """Rows of a length that the kernel's tiles divide."""
    rows = -(-rows // LANES) * LANES
    return -(-rows // min(512, rows)) * min(512, rows)


def _blocks(rows: int):
    """Tile sizes for rows padded to a multiple of min(512, rows)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    tile = min(512, rows)
    # Keys and values are fetched two tiles at a time, where that divides, and used one at a time.
    wide = 2 * tile if rows % (2 * tile) == 0 else tile
    # The fused backward pass computes the scores once, not twice.
    return splash.BlockSizes(
        block_q=tile, block_kv=wide, block_kv_compute=tile,
        block_q_dkv=tile, block_kv_dkv=wide, block_kv_dkv_compute=tile,
        use_fused_bwd_kernel=True,
    )  # fmt: skip


def causal(
    q_BSHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    segments_BS: jax.Array,
    *,
    whole: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.causal` or `attention.whole`; ``interpret`` runs it on any platform."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    s, h, d = q_BSHd.shape[1:]
    rows = padded(s)

    def laid_out(x_BSHd):  # zeros change no score, and pads see pads alone: their segment is 0
        padding = ((0, 0), (0, rows - s), (0, 0), (0, -d % LANES))
        return jnp.swapaxes(jnp.pad(x_BSHd, padding), 1, 2)

    segments_BS = jnp.pad(segments_BS, ((0, 0), (0, rows - s)))
    mask = masks.FullMask if whole else masks.CausalMask
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask((rows, rows)) for _ in range(h)]),
        block_sizes=_blocks(rows), head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip
    scaled = (q_BSHd.astype(jnp.float32) / jnp.sqrt(d)).astype(q_BSHd.dtype)
    out_BHSd = jax.vmap(kernel)(
        laid_out(scaled), laid_out(k_BSKd), laid_out(v_BSKd),
        splash.SegmentIds(segments_BS, segments_BS),
    )  # fmt: skip
    return jnp.swapaxes(out_BHSd, 1, 2)[:, :s, :, :d].astype(q_BSHd.dtype)


def executed_scores(rows: int) -> int:
    """Scores that the kernel computes for a head of one row: whole tiles up to the diagonal."""
    rows = padded(rows)
    blocks = _blocks(rows)
    tile, wide = blocks.block_q, blocks.block_kv
    return sum(tile * -(-end // wide) * wide for end in range(tile, rows + 1, tile))
