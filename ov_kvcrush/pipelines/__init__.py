"""The two pipelines that users see, and what they share."""
