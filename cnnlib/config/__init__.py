"""Experiments as data: fields, overrides, sweeps, and the step that combines an experiment with its data set."""
