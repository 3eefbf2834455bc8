"""What compressing the KV cache of a model costs, and which layers can share one: measured on texts."""
