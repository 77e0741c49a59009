"""Whether an accuracy under attack is to be believed."""
