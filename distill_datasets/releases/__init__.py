"""Answers become a versioned dataset: a folder that is a repository on the Hub.

release.py       publish(): the folder, file by file
contents.py      its rows by split, counted and digested, and the probabilities in `soft`
manifest.py      manifest.json: what the release says of itself, its version and the reason
diff.py          what changed between two releases
cards.py         the cards of datasets and students
check_files.py   held-out rows and tests over them, for who has not this package
push.py          one commit and one tag on the Hub
show.py          rows of a run or a release as they came
"""
