"""Many runs through shared programs: cohorts, their schedule, the axis R."""
