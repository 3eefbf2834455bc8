"""Scorers: how much a token is worth."""
