"""The words of a sweep's report."""

LEAD = (
    "Many runs of one experiment, which differ in a few settings and in their seeds. Runs of one "
    "seed see the same problems and the same noise, so that settings are compared seed by seed."
)
SECTIONS = {
    "learning": (
        "Learning curves",
        "The mean over the seeds of each setting; the band is a 95% bootstrap interval of that "
        "mean. Bands of few seeds are too narrow: with 4 they cover about 81%, with 8 about 89%.",
    ),
    "final": (
        "What the settings reached",
        "Held-out Pass@1 at the end. Differences are to the first setting, seed by seed, which "
        "takes out what the seeds have in common; an interval that holds 0 shows no difference.",
    ),
    "collapse": (
        "Collapses",
        "Runs that lost what they had learnt, or their variety, and did not recover. Reward: the "
        "accuracy in training fell below half of its best for good. Entropy: below a tenth of its "
        "start for good, which is success only near the ceiling of the task. Not finite: a loss "
        "or gradient that is no number.",
    ),
    "runs": ("Runs", "Every run has a report of its own."),
}
PANELS = {
    "pass": (
        "Pass@1 on held-out problems",
        "Bands that overlap throughout show no difference between the settings.",
    ),
    "reward": (
        "Reward of the sampled completions",
        "A curve that falls for good has collapsed; see below for the share of runs.",
    ),
    "entropy": (
        "Entropy of the policy",
        "The sooner it falls, the less a setting explores; near zero nothing new is tried.",
    ),
    "length": (
        "Response length",
        "A setting that stretches or shortens its answers shows here first.",
    ),
    "ends": (
        "Final Pass@1 of every run",
        "One point a run; the bar is the mean with its 95% interval.",
    ),
    "differences": (
        "Difference to the first setting, seed by seed",
        "One point a seed; the bar is the mean with its 95% interval, and 0 is no difference.",
    ),
    "heat": (
        "Final Pass@1 over the two axes of the sweep",
        "Each cell is the mean over the seeds of that combination, or one run where a seed is an "
        "axis; look for a plateau, not for the best cell.",
    ),
    "collapse": (
        "Share of runs that collapsed",
        "A setting whose bars are higher is less stable; the table has the iterations.",
    ),
}
TERMS = {
    "setting": "What a run changes besides its seed, by the names of the config's fields.",
    "seed": "Number that fixes a run's initial weights, order of problems and sampling noise.",
    "Pass@1": "The share of completions of held-out problems that are right.",
    "95% interval": "Where the mean over the seeds lies, by resampling the seeds.",
    "entropy": "How undecided the model is about its next token; 0 is certainty.",
    "cohort": "Runs that trained together because they share every compiled program.",
}
