"""The words of the gradient lab's report."""

SECTIONS = {  # slug -> (title, introduction)
    "direction": (
        "Which gradient points where it should?",
        "All algorithms see the same completions, sampled before the updates on the horizontal "
        "axis. Their gradients are compared with that of the expected reward, estimated from many "
        "fresh completions of the same problems by the policy as it is now.",
    ),
    "removed": (
        "What the gate takes away",
        "A gate weakens the gradient of tokens whose probability has moved. If that part of the "
        "gradient pointed the wrong way (fidelity below 0), the gate protects; if it pointed the "
        "right way (above 0), the gate throws signal away.",
    ),
    "geometry": (
        "How different are the gradients?",
        "Directions and lengths of the algorithms' gradients on the same completions.",
    ),
    "tokens": (
        "What happens to single tokens",
        "The gate weight w multiplies the probability ratio r; their product c multiplies the "
        "gradient of a token's log-probability.",
    ),
    "numbers": ("Numbers", "Of the policy after the largest number of updates."),
}
PANELS = {  # slug -> (title, what to look for)
    "fidelity": (
        "Fidelity as the completions grow stale",
        "1 is the direction of the target, 0 says nothing about it; the band is SAPO's 95% "
        "bootstrap interval over problems, and the others' are about as wide. Left: the expected "
        "reward. Right: each algorithm's own advantages and averaging, without any gate. All "
        "curves stay below 1, since few completions make a noisy gradient.",
    ),
    "difference": (
        "Fidelity minus that of the bare ratio",
        "The same completions, the same noise, the same average: right of 0 an algorithm points "
        "better than r·A with no gate at all. An interval that crosses 0 shows no difference.",
    ),
    "removed": (
        "Fidelity of what each algorithm removed",
        "Left of 0: harmful, and rightly removed. Right of 0: signal, lost. In brackets the share "
        "of the gradient mass Σ|c·A| that was removed: near 0% the answer hardly matters.",
    ),
    "groups": (
        "The gate's removal by groups of tokens",
        "Grey: what the tokens of a group carry without a gate. Orange: what the gate took from "
        "them. Above 0 it pointed the right way.",
    ),
    "share": (
        "Where the gate removes",
        "The share of the whole gradient mass that was removed in each group.",
    ),
    "cosines": (
        "Cosines between gradients",
        "1: the same direction. Algorithms that average alike are near 1 as long as ratios are "
        "near 1.",
    ),
    "layers": (
        "Cosine with the ungated gradient, by part of the model",
        "Where in the model an algorithm's gradient turns away from the ungated one.",
    ),
    "norms": (
        "Length of the gradient",
        "In units of the ungated gradient; a shorter gradient is a smaller learning rate in "
        "disguise, unless the optimiser rescales it.",
    ),
    "noise": (
        "Gradient noise scale",
        "The number of problems at which noise and signal are equally large; missing where the "
        "problems at hand show no signal.",
    ),
    "gates": (
        "Gate weights w",
        "Tokens at 1 count fully, those at 0 not at all (logarithmic counts; the outermost bars "
        "hold all beyond).",
    ),
    "coefficients": (
        "Coefficients c = r·w",
        "What the optimiser sees. SAPO's c exceeds 1 for ratios between 1 and 3.5.",
    ),
    "mass": (
        "Off-policy gradient mass",
        "The share of Σ|c·A| on tokens whose log-probability has moved by more than 0.05.",
    ),
    "ess": (
        "Effective share of the samples",
        "(Σv)²/(n·Σv²): 1 if all weigh the same; a few heavy ratios make it small.",
    ),
    "sequences": (
        "Gates within a sequence",
        "How far the mean of the gates is from the gate of the mean log r, against the variance "
        "of log r: the bound τ²/4·Var (line) holds for a gate on log r (blue), not for SAPO's on "
        "r − 1 (orange).",
    ),
    "negative": (
        "Push on tokens that were not drawn",
        "Σ|c·A|·√Σπ_v² over the other tokens of the vocabulary: negative updates hand probability "
        "to tokens that nobody judged.",
    ),
    "collateral": (
        "Dropped sequences",
        "The share of sequences with a signal that are dropped as a whole, and how many of their "
        "tokens had not moved (|log r| < 0.01).",
    ),
}
TERMS = {
    "update": "One step of the optimiser; 0 is the policy that wrote the completions.",
    "ratio r": "The probability of a token now, over its probability when it was sampled.",
    "ungated": "r·A averaged per sequence: the importance ratio and nothing else; "
    "ungated_token averages over all tokens.",
    "advantage A": "How much better (A > 0) or worse (A < 0) a completion scored than the others "
    "of the same problem.",
    "fidelity": "Cosine with the target's gradient, corrected for the noise of the target: "
    "½[cos(g, h₁) + cos(g, h₂)]/√cos(h₁, h₂) for two halves h of the fresh completions.",
    "gradient mass": "Σ|c·A| over tokens, each with its share in the average.",
}
