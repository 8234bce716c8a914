"""The one exception whose text is meant for the person at the terminal."""


class LoopError(Exception):
    """What went wrong, where, and what to do now, in one or two lines; the command line prints it and exits with 1."""
