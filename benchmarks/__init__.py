"""Measurements: one module per claim, each beside its limit in the same run."""
