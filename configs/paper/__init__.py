"""The experiments of SAPO's paper, arXiv 2511.20347, as far as it states them: docs/paper.md."""
