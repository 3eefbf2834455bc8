"""The suites: items with gold answers, and how answers are scored."""
