"""Frequencies of the rotary embedding and their scaling to longer contexts.

`frequencies` rounds where Hugging Face's ``transformers`` rounds: in f32, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SCALINGS = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}  # type: (required parameters, optional ones)


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Refuse a scaling that would be computed otherwise than it says.

    Raises:
      ValueError: an unknown type, or a parameter that is missing or unknown.
    """
    kind = scaling.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(
            f"model.rope_scaling: rope_type={kind!r}: must be one of {', '.join(SCALINGS)}"
        )
    required, optional = SCALINGS[kind]
    given = set(scaling) - {"rope_type"}
    for what, names in (("lacks", required - given), ("knows no", given - required - optional)):
        if names:
            raise ValueError(
                f"model.rope_scaling: rope_type={kind!r} {what} {', '.join(sorted(names))}"
            )
    low, high = (scaling.get(f"{end}_freq_factor", i) for i, end in enumerate(("low", "high")))
    if low >= high:
        raise ValueError(
            f"model.rope_scaling: high_freq_factor={high}: must be above low_freq_factor={low}"
        )


def _llama3(inverse: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    low, high, context = (
        s[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = np.float32(2 * math.pi) / inverse
    blend = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    factor = np.float32(s["factor"])
    blended = (1 - blend) * inverse / factor + blend * inverse
    short = np.where(wavelength < context / high, inverse, blended)
    return np.where(wavelength > context / low, inverse / factor, short)


def _mscale(scale: float, multiplier: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * multiplier * math.log(scale) + 1.0


def _yarn(period: np.ndarray, dim: int, theta: float, s: Mapping[str, Any]):
    """YaRN (arXiv 2309.00071): fast pairs keep their frequency, slow ones are interpolated."""
    factor, context = s["factor"], s["original_max_position_embeddings"]
    attention = s.get("attention_factor")
    if attention is None:
        scales = s.get("mscale"), s.get("mscale_all_dim")
        attention = _mscale(factor)
        if all(scales):
            attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1])

    def pair(rotations):  # the pair, as a real number, that turns so often in the old context
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(s.get("beta_fast") or 32), pair(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # dim − 1, not dim/2 − 1: as in transformers
    high += 0.001 if low == high else 0.0
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    return (1 / (np.float32(factor) * period)) * (1 - keep) + (1 / period) * keep, attention


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """Angle per position of each pair, f32[head_dim/2], and the factor on cos and sin.

    θ^{−2i/d} for pair i (arXiv 2104.09864), changed as the scaling's type says.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    period = np.float32(theta) ** exponent
    kind = scaling.get("rope_type", "default")
    if kind == "yarn":
        inverse, attention = _yarn(period, head_dim, theta, scaling)
        return inverse.astype(np.float32), float(attention)
    inverse = 1 / period
    if kind == "linear":
        inverse = inverse / np.float32(scaling["factor"])
    elif kind == "llama3":
        inverse = _llama3(inverse, scaling)
    return inverse.astype(np.float32), 1.0
