"""Describe and register architectures as data, write them as text, count them exactly, and match their budgets."""
