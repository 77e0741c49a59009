"""CondLR in the trainers of other libraries."""
