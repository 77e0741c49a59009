"""What is asked of many runs."""
