"""Measurements of speed, peers beside us in the same run; nothing here asserts a time."""
