"""The native code in numpy: short, slow, and what its results must be."""
