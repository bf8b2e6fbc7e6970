"""Measurements, each `python -m benchmarks.NAME`: both sides in one run, ratios and not seconds."""
