"""The continuous-batching engine: input, schedule, run, sample, output."""
