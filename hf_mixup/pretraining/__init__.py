"""Mixing without labels: contrastive bases, their mixtures, and what trains and measures them."""
