"""The Hub: its client, references to one commit, and what must not leave this machine unseen.

client.py       reads and writes repositories
references.py   a folder here, or a name at one commit
screening.py    secrets and personal data in what is to be pushed
"""
