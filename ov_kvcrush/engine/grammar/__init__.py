"""Structured output: what an answer must look like, as bit masks over the vocabulary, computed while the model runs."""
