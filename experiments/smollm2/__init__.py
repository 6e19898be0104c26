"""SmolLM2-135M: the real model, from a wheel on PyPI."""
