"""Architectures as data: layers, notation, registered architectures, exact counts, receptive fields, budgets."""
