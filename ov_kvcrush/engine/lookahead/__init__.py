"""Decoding several tokens a step: tokens that may come next are guessed, and checked by the step that runs them."""
