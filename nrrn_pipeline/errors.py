"""What goes wrong in ways a user can mend: each message says what was given, what was expected, what to do."""

GO_ON = "what is done is kept: run the same command again to go on"


class NrrnError(Exception):
    """A message for the user, shown as one line; `exit_status` is the command line's."""

    exit_status = 1


class InputError(NrrnError):
    """What was asked for cannot be done as given; nothing has been written."""

    exit_status = 2


class RunError(NrrnError):
    """Something that began could not finish; what a run has done is kept, and the message says what to do next."""
