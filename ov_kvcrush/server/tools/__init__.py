"""Functions that a model may call: how it is told of them, and what it writes to call them."""
