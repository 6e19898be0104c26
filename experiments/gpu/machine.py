"""The device, and its own limits, of which the other sections' results are fractions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.gpu.timing import copy_bandwidth, emit, matmul_peak


def main(toy: bool) -> None:
    """Emit the versions, the peaks of matrix products and the bandwidth of a copy."""
    device = jax.devices()[0]
    emit("machine", device=device.device_kind, platform=device.platform, jax=jax.__version__)
    size = 512 if toy else 8192
    emit("machine", what="bf16 matmul", size=size, flops_per_s=matmul_peak(size))
    emit("machine", what="f32 matmul", flops_per_s=matmul_peak(size // 2, jnp.float32))
    emit("machine", what="copy", bytes_per_s=copy_bandwidth(2**20 if toy else 2**31))
