"""TPU chips, and the devices of a pod of them without one at hand."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """What a chip holds and can do.

    Attributes:
      hbm: bytes that programs may use.
      flops: bf16 FLOP/s.
      bandwidth: of its memory, bytes/s.
      link: bytes/s along one axis of the torus, both directions together.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float


CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 0.82e12, 0.9e11),
    "v5p": Chip(95.74 * 2**30, 459e12, 2.77e12, 1.8e11),
    "v6e": Chip(31.25 * 2**30, 918e12, 1.64e12, 1.8e11),
}


MOST = 2**14  # chips; a pod of v5p has 8,960


def parse(topology: str) -> tuple[str, int]:
    """The kind of chip and the number of chips of a topology such as ``v5p:4x4x8``.

    Raises:
      ValueError: it is not written so, or no such chip is known.
    """
    found = re.fullmatch(r"(\w+):(\d{1,4}(?:x\d{1,4}){0,2})", topology)
    chips = math.prod(map(int, found[2].split("x"))) if found else 0
    if not 1 <= chips <= MOST or found[1] not in CHIPS:
        what = f"<chip>:<a>x<b>[x<c>], chip of {', '.join(CHIPS)}, of 1 to {MOST} chips"
        raise ValueError(f"--topology={topology[:100]!r}: must be {what}")
    return found[1], chips


def chip_of(topology: str) -> Chip:
    """The chip of a topology; see `parse`."""
    return CHIPS[parse(topology)[0]]


def devices(topology: str) -> tuple[list[Any], bool]:
    """The devices of a topology, and whether programs for them are compiled as for TPU.

    Without libtpu they are devices of the CPU, as many; call it before anything runs then.

    Raises:
      ValueError: the topology is not known, or libtpu refuses it.
    """
    from jax.experimental import topologies

    kind, count = parse(topology)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-{count * (1 + (kind == 'v5p'))}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        return list(found), True
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology!r}: {error}") from None
    except RuntimeError:  # no libtpu
        jax.config.update("jax_num_cpu_devices", count)
        return jax.devices("cpu"), False
