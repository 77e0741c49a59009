"""Tests of the papers' theorems."""
