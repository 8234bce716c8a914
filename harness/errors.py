"""The exceptions whose text is meant for the person at the terminal."""


class LoopError(Exception):
    """What went wrong, where, and what to do now, in one or two lines; the command prints it and exits with `code`.

    As it is: something was refused, and nothing has been run because of it.
    """

    code = 2


class StageError(LoopError):
    """A stage failed, or left what the loop cannot go on with; what was finished before stays finished."""

    code = 1


class Stopped(BaseException):
    """A signal asked the command to end; not an `Exception`, so that nothing on the way swallows it."""

    def __init__(self, number: int):
        """`number` of the signal."""
        self.code = 128 + number
