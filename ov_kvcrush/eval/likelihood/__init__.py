"""Likelihood of given texts: teacher forcing, perplexity, lm-eval."""
