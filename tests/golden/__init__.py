"""Golden cases and the command that runs them: `python -m tests.golden DIR...`."""
