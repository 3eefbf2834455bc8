"""Measures of what compression costs in accuracy."""
