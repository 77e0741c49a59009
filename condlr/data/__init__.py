"""The datasets: one file each, which reads the official files. See `condlr.data.base`."""
