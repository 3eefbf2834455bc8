"""Searches on a few texts for settings of the cache that belong to one model."""
