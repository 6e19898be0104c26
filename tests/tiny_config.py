"""A run of seconds for the tests of the loop: every part of the quickstart, in small."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "tiny"
    c.iterations = 6
    c.task.options = ConfigDict({"terms": 2, "modulus": 10})
    c.model.preset = "nano"
    c.batch.prompts = 8
    c.batch.group_size = 4
    c.batch.minibatches = 2
    c.sampler.slots = 4
    c.learner.learning_rate = 1e-3
    c.learner.head_chunk = 64
    c.eval.every = 3
    c.eval.prompts = 8
    c.eval.samples = 4
    c.checkpoint.every = 3
    c.log.samples_every = 1
    c.log.samples = 4
    c.compilation_cache = ".cache/tests"
    return c
