"""The gradient lab: gradients of many algorithms on the same rows, and what they point at."""
