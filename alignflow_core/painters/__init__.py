"""Painters beside our own: generative process x conditioner x objective, each one file (see ``registry.py``)."""
