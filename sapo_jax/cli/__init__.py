"""What the commands share: flags, help, refusals in one line, configs by name, compiled programs.

FLAGS = cli.Flags("export", __doc__)
FLAGS.string("workdir", "", "Run directory.", required=True)

def main(given: cli.Flags) -> None: ...

if __name__ == "__main__":
    cli.run(main, FLAGS)
"""

from sapo_jax.cli import own
from sapo_jax.cli.configs import OPEN, from_config, make_room, shipped_configs
from sapo_jax.cli.flags import COMMANDS, Flags
from sapo_jax.cli.process import missing, run, use_cache
from sapo_jax.cli.signals import Stopped
from sapo_jax.cli.text import flat, literal, nearest, several, table

__all__ = [
    "COMMANDS", "OPEN", "Flags", "Stopped", "flat", "from_config", "literal", "make_room",
    "missing", "nearest", "own", "run", "several", "shipped_configs", "table", "use_cache",
]  # fmt: skip
