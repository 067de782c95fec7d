"""Compile for accelerators that are not there, and estimate what programs would take on them."""
