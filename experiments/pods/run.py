"""Do the pod configs fit? Compiles their programs for each pod and writes docs/preflight.md.

    make preflight

Results go to results/<config>-<topology>.json; ``--table`` writes the page from those that are
there.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from sapo_jax import preflight_tables

_TABLE = flags.DEFINE_bool("table", False, "Only write the page.")

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "preflight.md"
PODS = (
    ("qwen3_4b_v5e", "v5e:4x4"),
    ("qwen3_8b_v6e", "v6e:4x4"),
    ("qwen3_30b_a3b_v5p", "v5p:4x4x4"),
    ("qwen3_30b_a3b_v5p", "v5p:4x4x8"),
)
INTRODUCTION = """# The pod configs, compiled ahead of time

Written by `make preflight` from `experiments/pods/results`: every program of an iteration, compiled
with libtpu for the pod named, on a machine without a TPU. Nothing here was measured on one. Times
are lower bounds: the largest of FLOPs, bytes of memory and bytes between chips, each over what the
chip can do; the MFU that follows is an upper one. "decode" is one step with all slots at full
length. FLOPs are of matmuls and kernels, each loop's body as often as it turns; the model's are
6·N_active + 6·L·H·d·S a token (causal), the head's for completion tokens alone.

"""


def _path(config: str, topology: str) -> pathlib.Path:
    return HERE / "results" / f"{config}-{topology.replace(':', '-')}.json"


def page(reports: list[dict]) -> str:
    """The page for these reports."""
    seconds = sum(r["compile_seconds"] for report in reports for r in report["programs"])
    missed = [
        f"- `{report['name']}`, `{report['topology']}`: {c['name']} is {c['value']:.2f}, "
        f"at most {c['limit']:.2f} is wanted"
        for report in reports
        for c in report["checks"]
        if not c["met"]
    ]
    verdict = "\n".join(["Demands that are not met:", "", *missed]) if missed else (
        "Every demand is met: 10% of the memory free, an update of at most 1.40 times the model's "
        "FLOPs, no logits of whole rows, no parameters gathered but those of one layer and of the "
        "vocabulary, temporaries of decoding within the cache and 10% of the weights."
    )  # fmt: skip
    table = preflight_tables.markdown(reports)
    return (
        f"{INTRODUCTION}{table}\nAll compiles together: {seconds / 60:.0f} minutes.\n\n{verdict}\n"
    )


def main(argv: list[str]) -> None:
    """Compile for every pod, then write the page."""
    del argv
    if not _TABLE.value:
        for config, topology in PODS:
            where = f"--config=configs/pod/{config}.py", f"--topology={topology}"
            command = [sys.executable, "-m", "sapo_jax.preflight", *where]
            # It exits with 1 where a demand is not met.
            subprocess.run([*command, f"--json={_path(config, topology)}"], check=False)
    paths = [path for pod in PODS if (path := _path(*pod)).exists()]
    PAGE.write_text(page([json.loads(path.read_text()) for path in paths]))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    app.run(main)
