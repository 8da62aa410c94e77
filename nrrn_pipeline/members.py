"""Several processes that carry out one plan together without a scheduler, as the jobs of a job array do.

    DST/0/nrrn/members/OWNER.json     a sign of life of each
    DST/0/nrrn/claims/KEY.json        who is at work on a piece of it

Each takes one of N parts of the work, of neighbours, then what others have left. A piece is claimed by a conditional
write before it is begun, and claimed anew if its owner is gone: then two may work on it, and both write the same bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.lease import driver_names, last_driver, member_url, members, wait_for_driver
from nrrn_pipeline.presence import Presence, Watch, has_ended

MAX_MEMBERS = 100_000
AT_ONCE = 8  # others' pieces, before it is looked again who has claimed what


@dataclass(frozen=True)
class Share:
    """Which part of the work is begun with: of `of` parts of neighbouring pieces, the one with this number."""

    number: int
    of: int

    def __post_init__(self) -> None:
        """Raises InputError if there is no such part."""
        if not 0 <= self.number < self.of <= MAX_MEMBERS:
            raise InputError(
                f"shard {self.number} of {self.of} is not possible: numbers are 0 to {max(self.of, 1) - 1}, "
                f"of {MAX_MEMBERS} at most"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def part(self, pieces: Sequence[str], turn: int = 0) -> Sequence[str]:
        """Its own, or that of the one so many numbers on."""
        number = (self.number + turn) % self.of
        return pieces[len(pieces) * number // self.of : len(pieces) * (number + 1) // self.of]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of str: "3/64". Raises InputError for any other text."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and len(text) < 20):
            raise InputError(f"shard {text!r} is not understood: expected I/N such as 3/64, I from 0 to N-1")
        return cls(int(number), int(of))


@dataclass
class Member:
    """One of the processes, at work from `join` to `leave`."""

    ledger_url: str
    share: Share
    facts: dict[str, Any] = field(default_factory=dict)
    presence: Presence = field(init=False)
    _watch: Watch = field(default_factory=Watch)
    _claims: set[str] = field(default_factory=set)
    _begun: bool = False

    def __post_init__(self) -> None:
        self.facts["share"] = str(self.share)
        self.presence = Presence(self.facts)

    def join(self) -> Generator[float, None, None]:
        """Show that this process is at work, yielding the seconds waited for a driver that may be alive.

        Raises InputError if a driver is at work.
        """
        self.presence.announce()
        try:
            while True:
                gone = yield from wait_for_driver(self.ledger_url)
                storage.write_document(self._url, self.presence.document("running"))
                if driver_names(self.ledger_url) == gone:  # none began while we did
                    break
                storage.remove_file(self._url)
            last = last_driver(self.ledger_url)
            if last is not None and not has_ended(last):  # it died at work
                for name in gone:
                    storage.remove_file(f"{self.ledger_url}/drivers/{name}")
        except BaseException:
            self.presence.withdraw()
            raise
        self.presence.keep(self._url, self._trouble)

    def check(self) -> None:
        """Raises RunError if the output is gone."""
        self.presence.check()

    def leave(self) -> None:
        """Give up all claims; others may take them at once."""
        self.presence.end()
        with suppress(OSError):  # where storage is away others wait until the file has not changed for a while
            for key in list(self._claims):
                self.drop(key)
            storage.remove_file(self._url)

    def clear_up(self) -> bool:
        """To be called when all is done, after `leave`: delete what processes that are gone left behind.

        Whether no other is at work. Those that end at the same time all do it.
        """
        alive = False
        for url in [member_url(self.ledger_url, owner) for owner in members(self.ledger_url)]:
            if self._watch.is_alive(url):
                alive = True
            else:
                storage.remove_file(url)
        if not alive:
            storage.remove_tree(f"{self.ledger_url}/claims")
        return not alive

    def claim(self, key: str) -> bool:
        """Whether the piece of work is this process's now: not if another that may be alive has claimed it."""
        url = self._claim_url(key)
        self._claims.add(key)
        if self._write_claim(url):
            return True
        if not self._is_held(url):
            storage.remove_file(url)  # of several who do this at a time, one or more go on: all write the same
            if self._write_claim(url):
                return True
        self._claims.discard(key)
        return False

    def _write_claim(self, url: str) -> bool:
        """Whether it is there now, and this process's."""
        written = storage.write_document(url, {"owner": self.presence.owner}, new=True)
        return written or self.presence.is_owner_of(url)

    def drop(self, key: str) -> None:
        """The piece is done, or is somebody else's to do."""
        storage.remove_file(self._claim_url(key))
        self._claims.discard(key)

    def claimed(self, pieces: Sequence[str], left: set[str]) -> Iterator[str]:
        """Some of the pieces that are `left`, each claimed when it is asked for.

        All of its own part of `pieces` that nobody has claimed; else a few neighbours of others', those that they would
        come to last, in order; else those that somebody had claimed who is gone. None: all are in others' hands.
        """
        claims = {name.removesuffix(".json") for name in storage.list_sizes(f"{self.ledger_url}/claims")}
        own = [key for key in self.share.part(pieces) if key in left]
        others = [key for key in self._of_others(pieces) if key in left]
        free = [[key for key in keys if key not in claims] for keys in (own, others)]
        for key in free[0] or free[1][AT_ONCE - 1 :: -1] or [*own[:AT_ONCE], *others[:AT_ONCE]]:
            self.check()
            if self.claim(key):
                yield key

    def _of_others(self, pieces: Sequence[str]) -> Iterator[str]:
        """Their pieces from the end, the next member's before the one's after."""
        for turn in range(1, self.share.of):
            yield from reversed(self.share.part(pieces, turn))

    def _is_held(self, url: str) -> bool:
        """Whether the process that claimed it may be alive."""
        try:
            claim = storage.read_document(url)
        except ValueError:
            return False  # torn: whoever wrote it does not rely on it
        if claim is None:
            return True  # dropped just now, and another may be about to claim it: what we deleted would be theirs
        owner = claim.get("owner")
        return isinstance(owner, str) and self._watch.is_alive(member_url(self.ledger_url, owner))

    @property
    def _url(self) -> str:
        return member_url(self.ledger_url, self.presence.owner)

    def _claim_url(self, key: str) -> str:
        return f"{self.ledger_url}/claims/{key}.json"

    def _trouble(self) -> str:
        there = storage.read_file(f"{self.ledger_url}/plan.json") is not None
        gone, self._begun = self._begun and not there, there
        return "the output was deleted under the run" if gone else ""
