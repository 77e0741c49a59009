"""The networks of the tables, as plain dense modules."""
