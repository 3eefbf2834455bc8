"""The paths of the server, one file for each of their groups."""
