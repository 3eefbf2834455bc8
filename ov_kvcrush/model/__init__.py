"""Model folders to compiled models: what a model is, whether it can run, how it is loaded."""
