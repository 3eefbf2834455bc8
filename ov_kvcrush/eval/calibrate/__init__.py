"""What compressing the KV cache costs, measured: profiles of a model."""
