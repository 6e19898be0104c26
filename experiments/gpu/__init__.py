"""How fast and how exact on a GPU: see README.md."""
