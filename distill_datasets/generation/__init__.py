"""Queries become answered rows: teachers asked, every answer paid for once."""
