"""The console script: ``sapo-jax train …`` is ``python -m sapo_jax.main …``, and so on."""

from __future__ import annotations

import os
import runpy
import sys

import sapo_jax
from sapo_jax.cli.flags import COMMANDS, refuse
from sapo_jax.cli.signals import Signals, end
from sapo_jax.cli.text import nearest, table


def main() -> None:
    """Run the command that is named first."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        rows = [(name, what) for name, (_, what) in COMMANDS.items()]
        print(
            "\n".join(
                ["sapo-jax COMMAND …; sapo-jax COMMAND --help shows its flags", "", *table(rows)]
            )
        )
    elif command == "--version":
        print(sapo_jax.__version__)
    elif command not in COMMANDS:
        near = nearest(command, COMMANDS) or f"; must be one of {', '.join(COMMANDS)}"
        refuse(f"unknown command {command!r}{near}")
    else:
        del sys.argv[1]
        sys.path.insert(0, os.getcwd())  # as python -m has it, for configs that import their own
        with Signals(end):  # while it is imported: there is nothing to save
            runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
