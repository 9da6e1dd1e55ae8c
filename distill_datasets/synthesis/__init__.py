"""Queries for a prompt that has none, written by its teacher.

run.py          synthesize(): rounds of questions, near-duplicates left out
interview.py    what the teacher is asked, and how its replies are read
query_file.py   queries.jsonl: rows by hand, and those that were written
coverage.py     which rules of a prompt the queries exercise
"""
