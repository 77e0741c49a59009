"""What trained networks are like: conditioning, cost, and whether attacks on them can be believed."""
