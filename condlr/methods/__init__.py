"""The methods, one file per row of the tables. See `condlr.methods.base.Method`."""
