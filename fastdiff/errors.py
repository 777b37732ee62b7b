"""Errors that several rooms raise and the command line shows as one line."""


class UsageError(Exception):
    """Bad input: one line on stderr, exit code 2."""
