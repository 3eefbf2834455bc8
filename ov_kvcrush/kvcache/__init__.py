"""Who owns which bytes of keys and values."""
