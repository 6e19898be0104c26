"""How far the sampler's log-probabilities are from the learner's."""
