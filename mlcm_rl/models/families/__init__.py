"""The families of teachers, one per file."""
