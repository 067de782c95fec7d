"""Measure speed beside stock Flax and PyTorch in the same run. Nothing here asserts a time."""
