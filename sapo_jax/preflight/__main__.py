"""What a config's programs take on a pod that is not there: memory, FLOPs, collectives, time.

With libtpu (``pip install libtpu``) programs are compiled as on the pod; without, for as many
devices of the CPU, and the output says so. The exit status is 1 where a demand is not met.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import jax

from sapo_jax import cli, preflight
from sapo_jax.report import preflight_tables
from sapo_jax.training import files, settings

FLAGS = cli.Flags("preflight", __doc__)
FLAGS.config_file()
FLAGS.string("topology", None, "Such as v5e:4x4 or v5p:4x4x8.", required=True)
FLAGS.words("programs", None, "Some of them; all by default.")
FLAGS.boolean("fit", False, "Search the largest micro-batch that fits.")
FLAGS.boolean("runs", False, "Search how many runs of a sweep fit side by side.")
FLAGS.string("json", None, "For the results; a run's report shows its preflight.json.")


def is_report(content: bytes) -> bool:
    """Whether a file is what ``--json`` writes."""
    return content.startswith(b"{") and b'"refused"' in content and b'"checks"' in content


def main(given: cli.Flags) -> None:
    """Print the report, write its JSON, and exit with 1 where a demand is not met."""
    if given.json:
        files.check_file(given.json, "--json=", is_report, "an earlier report")
    jax.config.update("jax_platforms", "cpu")
    devices, tpu = preflight.devices(given.topology)
    config = preflight.stand_in(given.config)

    def changed(fields: Mapping[str, int]) -> settings.Settings:
        config.update_from_flattened_dict(fields)
        return settings.from_config(config, devices=devices)

    def settings_of(micro_batches: int) -> settings.Settings:
        return changed({"batch.micro_batches": micro_batches})

    if given.runs:
        chip = preflight.chip_of(given.topology)
        tried = preflight.most_runs(changed, given.topology)
        print(preflight_tables.runs_text(tried, chip.hbm, len(devices), config.iterations))
        return

    if given.fit:
        chip = preflight.chip_of(given.topology)
        print(preflight_tables.fit_text(preflight.largest_micro_batch(settings_of, chip), chip.hbm))
        return
    checked = settings_of(config.batch.micro_batches)
    made = preflight.report(checked, given.topology, given.programs, tpu=tpu)
    print(preflight_tables.text(made))
    if given.json:
        files.write_text(files.normal(given.json), json.dumps(made, indent=1) + "\n")
    sys.exit(bool(made["refused"]) or any(not c["met"] for c in made["checks"]))


if __name__ == "__main__":
    cli.run(main, FLAGS)
