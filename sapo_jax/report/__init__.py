"""Pages and pictures from what any command left: a run, a sweep, a result of the gradient lab."""
