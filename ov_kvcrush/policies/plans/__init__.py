"""Plans: how many tokens each KV head keeps, and at which precision, for a number of bytes."""
