"""What the command line programs share: consoles, parsing of options, the environment of a run."""
