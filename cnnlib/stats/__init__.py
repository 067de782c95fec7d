"""Confidence intervals, paired comparisons and fitted curves."""
