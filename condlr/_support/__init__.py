"""Helpers for all other packages; they import none of those."""
