"""The penalties, one file each. See `condlr.penalties.base.Penalty`."""
