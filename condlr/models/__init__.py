"""The networks of the tables: plain dense modules that know nothing of low rank."""
