"""Contexts that belong to keys: in the store, in files, and between both."""
