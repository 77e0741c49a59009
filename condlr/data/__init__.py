"""The datasets, one file each. See `condlr.data.base`."""
