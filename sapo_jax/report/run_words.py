"""The words and the colours of a run's report."""

# Okabe and Ito's palette, safe for colour-blind readers. In the page each colour is a CSS variable
# of its name, so that the plots follow the reader's light or dark scheme.
COLOURS = {
    "ink": "#24292f",
    "soft": "#5c6570",
    "grid": "#dfe3e8",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#b05f91",
    "amber": "#e69f00",
    "grey": "#8c959f",
}
KINDS = {
    "reinforcement": (
        "Reinforcement learning",
        "A language model answers problems, the answers are scored, and its weights move towards "
        "the better answers of each problem. One iteration is one round of that.",
    ),
    "demonstrations": (
        "Supervised training",
        "A language model learns to imitate demonstrations: problems with their solutions.",
    ),
}
SECTIONS = {  # slug -> (title, introduction, panels)
    "learning": (
        "Learning",
        "Does the policy solve more problems than before, and is there still something to learn "
        "from? In long runs the bold line is the running mean of the pale one.",
        ("pass", "reward", "length", "zero-groups"),
    ),
    "policy": (
        "Policy and optimiser",
        "How fast does the policy change, and is the optimiser calm?",
        ("entropy", "gradient", "gap", "loss"),
    ),
    "ratios": (
        "Ratios and gates",
        "What the objective does to single tokens: the further the probability of a token has "
        "moved since it was sampled, the less its gradient counts.",
        ("log-ratio", "gate-weight", "extremes", "kl", "gate-mean", "gate"),
    ),
    "time": ("Time", "Where the seconds of an iteration go.", ("phases",)),
    "preflight": (
        "Preflight",
        "What each program needs on the devices that it was compiled for in advance. Nothing here "
        "was measured: times are lower bounds, the largest of FLOPs, bytes of memory and bytes "
        "between chips, each over what the chip can do.",
        (),
    ),
    "samples": (
        "Completions",
        "What the model wrote most recently. Signs in purple stand for characters that cannot be "
        "seen, such as line ends (↵).",
        (),
    ),
    "config": ("Configuration", "Everything that was set for this run.", ()),
}
PANELS = {  # slug -> (title, what to look for)
    "pass": (
        "Pass@1 on held-out problems",
        "Should rise and then level off; the band is the 95% bootstrap interval, and what is "
        "smaller than the band may be luck.",
    ),
    "reward": (
        "Reward of the sampled completions",
        "Should rise together with Pass@1; when it rises alone, the policy has learnt to please "
        "the scorer.",
    ),
    "length": (
        "Response length",
        "Longer answers may be better reasoned, but a growing share of answers cut at the length "
        "limit is a warning.",
    ),
    "zero-groups": (
        "Problems without a learning signal",
        "Where all completions of a problem get the same reward, nothing is learnt; near 100% the "
        "problems are too hard or too easy.",
    ),
    "entropy": (
        "Entropy of the policy",
        "Falls as the policy grows certain; near zero early on, it has stopped exploring.",
    ),
    "kl": (
        "Divergence from the old policy",
        "How far the updates of one iteration carry the policy from the one that wrote the "
        "completions; look for sudden jumps.",
    ),
    "gradient": (
        "Gradient norm",
        "Should stay within an order of magnitude; spikes often come before a collapse.",
    ),
    "gap": (
        "Sampler against learner",
        "Both should give a token the same probability: to 1e-5 in 32-bit arithmetic, and to 0.02 "
        "in the mean in 16-bit.",
    ),
    "loss": (
        "Loss",
        "Falls while a policy imitates demonstrations; in reinforcement learning its level means "
        "nothing, and only spikes are of interest.",
    ),
    "log-ratio": (
        "Log probability ratio of tokens",
        "Tokens at 0 have not moved since they were sampled; the wider the spread, the further "
        "the updates are off-policy (logarithmic counts; the outermost bars hold all beyond).",
    ),
    "gate-weight": (
        "Gate weight of tokens",
        "Tokens at 1 count fully and tokens at 0 not at all; the left tail is what the objective "
        "attenuates (logarithmic counts; the outermost bars hold all beyond).",
    ),
    "extremes": (
        "Extreme ratios of each minibatch",
        "The first minibatch of an iteration starts at 1; look for single tokens that escape far "
        "from it.",
    ),
    "gate-mean": (
        "Mean gate weight, and silenced tokens",
        "A soft gate leaves every token some gradient; a hard clip silences more tokens the "
        "further the policy moves.",
    ),
    "gate": (
        "The gate in closed form",
        "w = sech²(τ(r − 1)/2); shaded are the ratios that this run has seen, up to 4, and the "
        "flatter the curve over them, the less the gate has to do.",
    ),
    "phases": (
        "Phases of an iteration",
        "A phase that grows steadily is worth a look; regular peaks are evaluations and "
        "checkpoints.",
    ),
}
TERMS = {
    "policy": "The language model in training, as a chooser of the next token.",
    "completion": "An answer that the model writes to a problem (the prompt), token by token.",
    "reward": "The score of a completion.",
    "advantage A": "How much better (A > 0) or worse (A < 0) a completion scored than the others "
    "of the same problem.",
    "ratio r": "The probability of a token now, over its probability when it was sampled.",
    "gate weight w": "How much of a token's gradient the objective lets through.",
    "entropy": "How undecided the model is about its next token; 0 is certainty.",
    "Pass@k": "The chance that one of k completions of a problem, at least, is right.",
}
