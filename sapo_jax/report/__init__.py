"""Pages and pictures from what any command left: a run, a sweep, a result of the gradient lab."""

from __future__ import annotations

import shlex

from etils import epath

from sapo_jax import cli


def no_page(path: epath.PathLike) -> str:
    """What a command says at its end where there is no page: how to get it."""
    first = ""
    try:
        from sapo_jax.report import page  # noqa: F401
    except ImportError as error:
        first = f"{cli.missing(error)}, then "
    return f"no report yet: {first}python -m sapo_jax.report {shlex.quote(str(path))}"
