"""Policy optimisation of language models in JAX, built around SAPO (arXiv 2511.20347)."""

__version__ = "0.2.0.dev0"
