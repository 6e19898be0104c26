"""One section in a process of its own: ``python -m experiments.gpu.section NAME PHASE [toy]``."""

import importlib
import sys

if __name__ == "__main__":
    name, phase, *rest = sys.argv[1:]
    module = importlib.import_module(f"experiments.gpu.{name}")
    run = module.compile_all if phase == "untimed" else module.main
    run(bool(rest))
