"""Mixing without labels: contrastive bases, their mixtures, the trainer and the kNN evaluation."""
