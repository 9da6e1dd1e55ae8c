"""Base, teacher and student on the same rows."""
