"""What bodies may say, field by field; anything else is refused by its name."""
