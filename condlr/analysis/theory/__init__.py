"""What the papers prove, put to the test."""
