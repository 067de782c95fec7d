"""Check that a backend computes correct results."""
