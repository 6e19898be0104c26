"""Policy optimisation of language models in JAX, built around SAPO (arXiv 2511.20347)."""
