"""The shifts, one file each. See `condlr.shifts.base.Shift`."""
