"""Describe experiments as data: fields, overrides and sweeps. `resolve` combines an experiment with its data set."""
