"""Copies of a run's metrics for Weights & Biases and TensorBoard."""
