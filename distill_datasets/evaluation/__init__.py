"""Base, teacher and student on the same rows.

report.py    measure(): the report; report_text.py: as text; page.py: as a page of HTML
systems.py   who is compared, on which rows; settings.py: how
metrics.py   metrics by name; comparison.py: on all systems, with intervals
verdict.py   whether the student may replace the prompt; gate.py: rules for CI
judge.py     a model that judges texts, and what its opinions are worth
residue.py   what a training leaves behind, canaries too
money.py     what the student costs and saves; latency.py: and how long it takes
profile.py   what the rows of a dataset are like
"""
