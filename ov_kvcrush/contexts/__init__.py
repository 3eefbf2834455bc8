"""Texts that are compressed once and asked often, and their files."""
