"""The suite: what carries out a study."""
