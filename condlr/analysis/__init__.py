"""What trained weights are like: their conditioning."""
