"""Analyses of trained networks, one file each. See `condlr.analysis.base.Analysis`."""
