"""Compile for accelerators that this machine does not have, and estimate the time and memory of programs on them."""
