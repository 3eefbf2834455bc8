"""The continuous-batching engine: requests, scheduler, block pool, runner, sampler."""
