"""Answers become a versioned dataset: a folder that is a repository on the Hub."""
