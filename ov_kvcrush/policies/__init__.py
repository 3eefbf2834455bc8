"""Policies: what survives in the KV cache. `registry.build` makes one from a name and settings."""
