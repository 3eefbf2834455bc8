"""From an exported model to one that runs on a paged KV cache."""
