"""One folder, one question: README.md (the answer), run.py, results/."""
