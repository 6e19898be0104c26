"""What a search for runs side by side says."""

import pytest

from sapo_jax.report.preflight_tables import runs_text


@pytest.mark.parametrize(
    ("seconds", "chips", "own", "hours", "in_all", "iteration"),
    [
        (0.0123, 4, "1 chip", "0.00034", "0.00034", "0.012"),
        (188.0, 64, "16 chips", "5.2", "83.6", "188.0"),
        (1880.0, 1024, "256 chips", "52.2", "13,368.9", "1,880.0"),
    ],
)
def test_what_a_run_costs_is_said_at_any_size(seconds, chips, own, hours, in_all, iteration):
    common, hbm = {"fields": {"mesh.run": 4}, "total": 2.0**30, "seconds": seconds}, 2.0**31
    tried = [{"runs": 4, "fits": True, **common}, {"runs": 8, "fits": False, **common}]
    assert runs_text(tried, hbm, chips, 100).endswith(
        "Most that fit: 4, by --config.mesh.run=4\n"
        f"A run of 100 iterations takes {own} for at least {hours} hours, {in_all} chip-hours; "
        f"an iteration at least {iteration} s."
    )
    assert runs_text(tried[1:], hbm, chips, 100).endswith("No run fits.")
