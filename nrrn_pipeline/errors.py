"""What goes wrong in ways a user can mend: each message says what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence

GO_ON = "what is done is kept: run the same command again to go on"


MOST_CHARACTERS = 900  # of one message; what a file says of itself may be of any length


def readable(text: str) -> str:
    """One line that a terminal shows as it is: what a hostile file makes us quote cannot forge another line."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: MOST_CHARACTERS + 1])
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}..."


def few(words: Sequence[str], most: int, between: str = ", ") -> str:
    """The first ones, and how many more there are."""
    left_out = len(words) - most
    return between.join(words[:most]) + (f"{between.rstrip()} and {left_out} more" if left_out > 0 else "")


class NrrnError(Exception):
    """A message for the user, shown as one line; `exit_status` is the command line's."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


class InputError(NrrnError):
    """What was asked for cannot be done as given; nothing has been written."""

    exit_status = 2

    @classmethod
    def not_finite(cls, url: str, z: int) -> InputError:
        """Of voxels in a slice."""
        return cls(f"{url} holds NaN or infinite voxels in slice z={z}: replace them (with 0, say) first")


class RunError(NrrnError):
    """Something that began could not finish; what a run has done is kept, and the message says what to do next."""


class DivergedError(RunError):
    """Training's loss, or its weights, are no finite numbers any more."""


class LostError(RunError):
    """Another process of a training is gone, and has said why if it could."""


class SlabsFailedError(RunError):
    """Some slabs failed on every attempt, all others are done; the message names each, one a line."""

    exit_status = 3

    def __init__(self, message: str) -> None:
        Exception.__init__(self, "\n".join(map(readable, message.split("\n"))))

    @classmethod
    def of(cls, failed: dict[str, str], total: int) -> SlabsFailedError:
        """Of slabs, with their reasons."""
        lines = "".join(f"\nslab {key}: {reason}" for key, reason in sorted(failed.items()))
        return cls(f"{len(failed)} of {total} slabs failed every time. All others are done; {GO_ON}{lines}")


class StorageError(OSError):
    """Storage refused, or failed on every attempt; no retry helps if `permanent`. Its text never holds a secret."""

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(readable(message))
        self.permanent = permanent

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, bool]]:
        return type(self), (str(self), self.permanent)
