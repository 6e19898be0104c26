"""Preflight: what a config's programs take on a pod that is not there.

    devices, tpu = preflight.devices("v5e:4x4")
    settings = from_config(preflight.stand_in(config), devices=devices)
    preflight.report(settings, "v5e:4x4", tpu=tpu)    # memory, FLOPs, collectives, times, checks

`programs` lowers the functions that train; `hlo` reads what the compiler made of them, `costs`
counts it, `measure` brings it together for each program, `demands` says what must be met, `places`
how many runs a slice holds.
"""

from sapo_jax.preflight.chips import CHIPS, chip_of, devices
from sapo_jax.preflight.measure import largest_micro_batch, report, stand_in
from sapo_jax.preflight.places import most_runs

__all__ = [
    "CHIPS", "chip_of", "devices", "largest_micro_batch", "most_runs", "report", "stand_in",
]  # fmt: skip
