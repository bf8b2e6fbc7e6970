"""Readouts: what the model says is wrong (foundations), what it would do (conduct), whether it still speaks (fluency)."""
