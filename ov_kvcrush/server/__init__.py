"""The program `ov_kvcrush-serve`: OpenAI's API and contexts over HTTP, on one engine that many clients share."""
