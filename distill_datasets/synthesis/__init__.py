"""Queries for a prompt that has none, written by its teacher."""
