"""What any room may use: checks, files that are whole or absent, memory of the process."""
