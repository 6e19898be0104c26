"""How answers are judged: mathematics by equality, programs by tests in a sandbox."""
