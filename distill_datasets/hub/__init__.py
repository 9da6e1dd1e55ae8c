"""The Hub: its client, references to one commit, and what must not leave this machine unseen."""
