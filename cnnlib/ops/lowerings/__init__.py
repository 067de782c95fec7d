"""Lowerings: how each primitive runs on a CPU, a GPU and a TPU."""
