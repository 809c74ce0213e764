"""Measurements. Never run as tests: the figures depend on the machine, only ratios within one run count."""
