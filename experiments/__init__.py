"""The paper's tables and ours: `python -m experiments --help`."""
