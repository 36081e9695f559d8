"""Measure a model on the problems of a task: pass@k, maj@k and their confidence intervals."""
