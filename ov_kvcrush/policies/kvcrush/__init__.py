"""KVCrush, arXiv 2503.00022: bits of tokens, groups by Hamming distance, representatives."""
