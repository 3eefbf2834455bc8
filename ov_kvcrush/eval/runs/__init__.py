"""Running items under settings, and the folders that keep what came out."""
