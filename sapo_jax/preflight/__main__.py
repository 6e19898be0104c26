"""Command line: what a config's programs take on a pod that is not there.

    python -m sapo_jax.preflight --config=configs/pod/qwen3_4b_v5e.py --topology=v5e:4x4

With libtpu (``pip install libtpu``) programs are compiled as on the pod; without, for as many
devices of the CPU, and the output says so.
"""

from __future__ import annotations

import json
import sys

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from sapo_jax.preflight import chips
from sapo_jax.preflight.measure import largest_micro_batch, report, stand_in
from sapo_jax.report import preflight_tables
from sapo_jax.training import settings


def main(argv: list[str]) -> None:
    """Print the report, write its JSON, and exit with 1 where a demand is not met."""
    given = flags.FLAGS
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.<field>=<value>")
    jax.config.update("jax_platforms", "cpu")
    try:
        found, tpu = chips.devices(given.topology)
        checked = settings.from_config(stand_in(given.config), devices=found)
        if given.fit:
            chip = chips.CHIPS[chips.parse(given.topology)[0]]
            print(preflight_tables.fit_text(largest_micro_batch(checked, chip), chip.hbm))
            return
        made = report(checked, given.topology, given.programs, tpu)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(preflight_tables.text(made))
    if given.json:
        epath.Path(given.json).write_text(json.dumps(made, indent=1) + "\n")
    sys.exit(bool(made["refused"]) or any(not c["met"] for c in made["checks"]))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
    flags.DEFINE_string("topology", None, "Such as v5e:4x4 or v5p:4x4x8.")
    flags.DEFINE_list("programs", None, "Some of them; all by default.")
    flags.DEFINE_bool("fit", False, "Search the largest micro-batch that fits.")
    flags.DEFINE_string(
        "json", None, "File for the results; a run's report shows those in its preflight.json."
    )
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
