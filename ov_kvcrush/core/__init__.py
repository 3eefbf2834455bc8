"""Plain data that travels between the rooms: requests, steps, sampling, wishes for the cache, results."""
