"""The command line: verbs and their arguments.

main.py       all verbs, their help, and errors with exit codes
dataset.py    from `new` to `publish`, `show` and `diff`
student.py    from `train` and `measure` to `push`, `serve` and `rollout`
evidence.py   what looks: `page`, `cost`, `gate`, `profile`, `coverage`, `check`
flags.py      flags out of settings
"""
