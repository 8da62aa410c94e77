"""Claims on pieces of work, and who shares a run: one winner each, none for ever, and drivers and members apart."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrrn_pipeline import presence as presence_module
from nrrn_pipeline import storage
from nrrn_pipeline.errors import InputError, RunError
from nrrn_pipeline.lease import Lease, last_driver, member_url, members
from nrrn_pipeline.members import AT_ONCE, MAX_MEMBERS, Member, Share
from tests.servers import ObjectStore

LEASE_S = 1.0
SOON_S = 30.0
PIECES = [f"z{number}" for number in range(40)]
ELSEWHERE = {"owner": "other", "state": "running", "renewed": 0.0, "host": "far", "pid": 7, "machine": "far"}


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "RENEW_S", 0.05)
    monkeypatch.setattr(presence_module, "LEASE_S", LEASE_S)
    monkeypatch.setattr(presence_module, "LOOK_S", 0.02)


@contextmanager
def joined(url: str, number: int = 0, of: int = 2) -> Iterator[Member]:
    member = Member(url, Share(number, of))
    list(member.join())
    try:
        yield member
    finally:
        member.leave()


@contextmanager
def driving(url: str) -> Iterator[Lease]:
    lease = Lease(url)
    list(lease.take())
    try:
        yield lease
    finally:
        lease.release("interrupted")


def claims(url: str) -> set[str]:
    return {name.removesuffix(".json") for name in storage.list_sizes(f"{url}/claims")}


def put_claim(url: str, key: str, owner: str) -> None:
    storage.write_document(f"{url}/claims/{key}.json", {"owner": owner})


def put_member(url: str, owner: str = "other", **fields: Any) -> None:
    storage.write_document(member_url(url, owner), ELSEWHERE | {"owner": owner} | fields)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@given(of=st.integers(1, MAX_MEMBERS), data=st.data())
def test_a_share_is_read_as_it_is_written(of: int, data: st.DataObject) -> None:
    share = Share(data.draw(st.integers(0, of - 1)), of)
    assert Share.parse(str(share)) == share


@pytest.mark.parametrize(
    "text",
    ["", "/", "1", "1/", "/2", "-1/2", "2/2", "3/2", "0/0", "1/2/3", "a/b", "1 /2", "+1/2", "1.0/2", "0/100001", "1/²"],
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^shard .* is (not understood: expected I/N|not possible: numbers are 0 to)"):
        Share.parse(text)


@given(text=st.text() | st.from_regex(r"[0-9]{0,30}/[0-9]{0,5000}", fullmatch=True))
def test_no_text_does_more_than_name_a_share_or_be_refused(text: str) -> None:
    try:
        share = Share.parse(text)
    except InputError as error:
        assert len(str(error)) < 1100  # noqa: PT017
    else:
        assert 0 <= share.number < share.of <= MAX_MEMBERS


@settings(deadline=None)
@given(of=st.integers(1, 12), count=st.integers(0, 60))
def test_shares_are_all_pieces_and_each_piece_is_in_one(of: int, count: int) -> None:
    pieces = [f"z{number}" for number in range(count)]
    claimed = []
    for number in range(of):
        member = Member(f"memory://nobody/{of}-{count}-{number}", Share(number, of))
        own = list(member.claimed(pieces, set(pieces)))
        member.leave()
        claimed += own[: count * (number + 1) // of - count * number // of]  # none of one's own: then it is others'
    assert Counter(claimed) == Counter(pieces)


def test_a_member_is_seen_from_the_first_to_the_last_moment(place: str) -> None:
    assert members(place) == {}
    with joined(place, 3, 8) as member:
        document = members(place)[member.presence.owner]
        assert (document["state"], document["share"], document["pid"]) == ("running", "3/8", os.getpid())
        member.facts["slabs"] = 5
        until(lambda: members(place)[member.presence.owner].get("slabs") == 5)
        member.check()
    assert members(place) == {}


def test_of_two_a_claim_has_one_owner_until_it_is_dropped(place: str) -> None:
    with joined(place, 0) as first, joined(place, 1) as second:
        assert first.claim("z0")
        assert first.claim("z0"), "again, as its own"
        assert not second.claim("z0")
        first.drop("z0")
        assert claims(place) == set()
        assert second.claim("z0")
        assert not first.claim("z0")


def winners_of_one_claim(url: str, many: int = 8) -> int:
    ready = threading.Barrier(many)
    sharing = [Member(url, Share(number, many)) for number in range(many)]

    def claim(member: Member) -> int:
        ready.wait()
        return sum(member.claim(key) for key in PIECES[:5])

    try:
        for member in sharing:
            list(member.join())
        with ThreadPoolExecutor(many) as pool:
            won = sum(pool.map(claim, sharing))
        assert claims(url) == set(PIECES[:5])
    finally:
        for member in sharing:
            member.leave()
    return won


def test_of_many_claimants_at_a_time_one_wins_each_piece(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)  # however late a renewal comes on a busy machine
    assert winners_of_one_claim(place) == 5


def test_of_many_claimants_one_wins_each_piece_on_a_real_object_store(
    seaweed: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    seaweed.make_bucket("claims")
    with seaweed.in_use():
        assert winners_of_one_claim("s3://claims/0/nrrn") == 5


def test_many_members_do_each_piece_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does: claim, look whether it is done, do it, say so, drop the claim."""
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    done, lock = Counter[str](), threading.Lock()

    def work(number: int) -> None:
        with joined(place, number, 4) as member:
            while left := set(PIECES) - set(done):
                for key in member.claimed(PIECES, left):
                    if key not in done:
                        with lock:
                            done[key] += 1
                    member.drop(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert done == Counter(PIECES)
    assert claims(place) == set()


def test_own_pieces_come_first_then_a_few_that_others_come_to_last(place: str) -> None:
    with joined(place, 1, 4) as member:
        left = set(PIECES)
        own = list(member.claimed(PIECES, left))
        assert own == PIECES[10:20], "neighbours"
        left -= set(own)
        others = list(member.claimed(PIECES, left))
        assert others == PIECES[20:30][-AT_ONCE:]


def test_a_claim_that_is_dropped_while_another_looks_at_it_goes_to_one_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.read_document
    with joined(place, 0, 3) as first, joined(place, 1, 3) as second, joined(place, 2, 3) as third:
        assert first.claim("z0")

        def late(url: str) -> Any:
            """Between this look and what it leads to another is faster."""
            document = read(url)
            if "claims" in url and first.presence.owner in str(document):
                first.drop("z0")
            elif "claims" in url and document is None:
                monkeypatch.setattr(storage, "read_document", read)
                assert third.claim("z0")
            return document

        monkeypatch.setattr(storage, "read_document", late)
        assert not second.claim("z0")
        assert read(f"{place}/claims/z0.json") == {"owner": third.presence.owner}


def test_what_others_hold_is_not_waited_for_while_there_is_more(place: str) -> None:
    with joined(place, 0, 2) as first, joined(place, 1, 2) as second:
        assert first.claim(PIECES[2])
        assert list(second.claimed(PIECES[:4], set(PIECES[:4]))) == [PIECES[3]]
        assert list(second.claimed(PIECES[:4], {PIECES[0], PIECES[2]})) == [PIECES[0]]
        assert list(second.claimed(PIECES[:4], {PIECES[2]})) == []


@pytest.mark.parametrize("fields", [{"state": "complete"}, {"pid": 2**22 + 1, "machine": None}])
def test_the_claim_of_one_who_has_ended_is_taken_at_once(
    place: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    if "machine" in fields:  # it ran here, and its number is nobody's
        fields = fields | {"machine": presence_module._machine(), "began": 1}
    put_member(place, **fields)
    put_claim(place, "z0", "other")
    with joined(place) as member:
        assert member.claim("z0")


def test_the_claim_of_one_who_left_no_sign_is_taken_at_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    put_claim(place, "z0", "other")
    with joined(place) as member:
        assert list(member.claimed(["z0", "z1"], {"z0"})) == ["z0"]


def test_the_claim_of_a_silent_one_elsewhere_is_taken_after_the_lease_and_no_sooner(place: str) -> None:
    put_member(place)
    put_claim(place, "z0", "other")
    with joined(place) as member:
        started = time.monotonic()
        until(lambda: member.claim("z0"))
        assert time.monotonic() - started >= LEASE_S


def test_the_claim_of_one_that_gives_signs_is_never_taken(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 3 * LEASE_S)  # however late a renewal comes on a busy machine
    with joined(place, 0) as alive, joined(place, 1) as member:
        assert alive.claim("z0")
        ends = time.monotonic() + 6 * LEASE_S
        while time.monotonic() < ends:
            assert not member.claim("z0")
            time.sleep(0.05)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"owner": "other"}', storage.sealed({"owner": 7})])
def test_a_claim_that_cannot_be_read_is_nobodys(place: str, content: bytes) -> None:
    storage.write_file(f"{place}/claims/z0.json", content)
    with joined(place) as member:
        assert member.claim("z0")
        assert storage.read_document(f"{place}/claims/z0.json") == {"owner": member.presence.owner}


@given(content=st.binary() | st.just(b"[" * 100_000), owner=st.text(max_size=30))
@settings(deadline=None)
def test_no_claim_does_harm(content: bytes, owner: str) -> None:
    member = Member("memory://hostile/nrrn", Share(0, 1))
    storage.write_file("memory://hostile/nrrn/claims/z0.json", content)
    assert member.claim("z0")
    put_claim("memory://hostile/nrrn", "z1", owner)
    assert member.claim("z1")
    member.leave()


def test_who_leaves_gives_up_all_claims(place: str) -> None:
    with joined(place) as member:
        assert len(list(member.claimed(PIECES, set(PIECES)))) == 20
        assert len(claims(place)) == 20
    assert claims(place) == set()


def test_who_leaves_keeps_its_hands_off_others_claims(place: str) -> None:
    with joined(place, 0) as first:
        assert first.claim("z0")
        with joined(place, 1) as second:
            assert not second.claim("z0")
        assert claims(place) == {"z0"}


def test_the_last_to_leave_clears_up_after_the_dead(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with joined(place, 0) as first:
        put_member(place, "dead", state="complete")
        put_claim(place, "z9", "dead")
        with joined(place, 1) as second:
            pass
        assert not second.clear_up(), "the first is at work"
        assert members(place).keys() == {first.presence.owner}
        assert claims(place) == {"z9"}
    assert first.clear_up()
    assert members(place) == {}
    assert claims(place) == set()


def test_a_driver_is_refused_while_members_are_at_work(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with joined(place):
        with pytest.raises(InputError, match=f"another nrrn denoise is at work on this output: process {os.getpid()}"):
            list(Lease(place).take())
        assert last_driver(place) is None
    with driving(place) as lease:
        lease.check()


def test_a_member_is_refused_while_a_driver_is_at_work(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    with driving(place):
        with pytest.raises(InputError, match="another nrrn denoise is at work"):
            list(Member(place, Share(0, 1)).join())
        assert members(place) == {}
    with joined(place) as member:
        member.check()


@pytest.mark.parametrize("fields", [{}, {"state": "complete"}])
def test_a_driver_follows_dead_members_and_deletes_their_signs(
    place: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    lease_s = 600.0 if fields else LEASE_S  # who said that it ended is not waited for
    monkeypatch.setattr(presence_module, "LEASE_S", lease_s)
    put_member(place, **fields)
    started = time.monotonic()
    with driving(place):
        assert fields or time.monotonic() - started >= lease_s
        assert members(place) == {}


def test_of_members_and_drivers_at_a_time_one_kind_is_at_work(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "LEASE_S", 600.0)
    ready, over = threading.Barrier(6), threading.Barrier(6)

    def begin(number: int) -> str:
        one = Member(place, Share(number, 6)) if number % 2 else Lease(place)
        ready.wait()
        try:
            list(one.join() if isinstance(one, Member) else one.take())
            kind = type(one).__name__
        except InputError:
            kind = ""
        over.wait()
        one.leave() if isinstance(one, Member) else one.release("interrupted")
        return kind

    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            kinds = Counter(filter(None, pool.map(begin, range(6))))
        assert kinds in (Counter(), Counter({"Lease": 1})) or set(kinds) == {"Member"}, kinds


def test_a_member_whose_output_is_deleted_notices(place: str) -> None:
    with joined(place) as member:
        storage.write_document(f"{place}/plan.json", {})
        until(lambda: member._begun)
        storage.remove_tree(place)

        def stopped() -> bool:
            try:
                member.check()
            except RunError as error:
                return "the output was deleted under the run; what is done is kept" in str(error)
            return False

        until(stopped)
    assert not storage.exists(place)


def test_storage_that_is_away_when_it_leaves_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise storage.StorageError("away")

    with joined(str(tmp_path)) as member:
        assert member.claim("z0")
        monkeypatch.setattr(storage, "remove_file", away)
    assert claims(str(tmp_path)) == {"z0"}
    monkeypatch.undo()
    with joined(str(tmp_path)) as other:  # of this process it is known that it has ended
        assert other.claim("z0")
