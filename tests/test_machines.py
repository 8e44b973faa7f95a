"""Several machines, here threads: they find each other, and when one ends the others end too."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.machines import Alone, Failure, Follower, Lead, PartnerEnded, Place, find_place
from hymba_tune.topology import Topology, free_port

TWO = Topology(Path("ddp.yaml"), processes=2, machines=2)


@pytest.fixture
def place() -> Place:
    return Place(0, 2, "127.0.0.1", free_port())


def second(place: Place, machines: int = 2, machine: int = 1) -> Place:
    return Place(machine, machines, place.address, place.port)


@contextmanager
def beside(function: Callable[[], Any]) -> Iterator[Queue[Any]]:
    """A thread with its result, or what it raised."""
    results: Queue[Any] = Queue()

    def run() -> None:
        try:
            results.put(function())
        except BaseException as error:
            results.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield results
    thread.join(30)
    assert not thread.is_alive()
    if not results.empty() and isinstance(left := results.get(), BaseException):
        raise left


def until(check: Callable[[], None]) -> None:
    """Call until it raises what it is for."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        check()
        time.sleep(0.01)


def test_both_meet_at_the_port_that_the_first_finds_and_end_together(place: Place) -> None:
    def follow() -> list[Any]:
        seen: list[Any] = []
        with Follower(second(place)) as partners:
            while (stage := partners.next_stage()) is not None:
                seen += [stage, partners.prepare(stage, TWO)]
                partners.check()
                partners.end([])
        return seen

    with beside(follow) as results:
        with Lead(place, 20) as partners:
            topologies = []
            for stage in ("one", "two"):
                topologies.append(partners.prepare(stage, TWO))
                partners.begin()
                assert partners.end([]) == []
        one, theirs, two, theirs_then = results.get(timeout=20)
    assert (one, two) == ("one", "two")
    assert [(mine.machine, mine.port) for mine in topologies] == [(0, theirs.port), (0, theirs_then.port)]
    assert (theirs.machine, theirs.address, theirs.processes) == (1, "127.0.0.1", 2)


def test_a_stage_on_one_machine_is_none_of_the_others_business(place: Place) -> None:
    def follow() -> str | None:
        with Follower(second(place)) as partners:
            stage = partners.next_stage()
            partners.end([])
            return stage

    with beside(follow) as results, Lead(place, 20) as partners:
        alone = Topology(Path("single.yaml"))
        assert partners.prepare("single", alone) == alone
        partners.begin()
        partners.check()
        assert partners.end([Failure(1, "mine")]) == [Failure(1, "mine")]
        partners.prepare("shared", TWO)
        partners.begin()
        assert results.get(timeout=20) == "shared"
        assert partners.end([]) == []


def test_a_failure_elsewhere_ends_the_ranks_here_and_is_told(place: Place) -> None:
    def follow() -> None:
        with Follower(second(place)) as partners:
            partners.next_stage()
            partners.end([Failure(7, "later"), Failure(5, "ValueError in rank 1: a bug")])
            assert partners.next_stage() is None

    def lead() -> None:
        with Lead(place, 20) as partners:
            partners.prepare("one", TWO)
            partners.begin()
            with pytest.raises(PartnerEnded):
                until(partners.check)
            assert partners.end([]) == [Failure(5, "ValueError in rank 1: a bug")]
            raise ValueError("the run fails")

    with beside(follow) as results:
        with pytest.raises(ValueError, match="the run fails"):
            lead()
        assert results.get(timeout=20) is None


def test_a_failure_here_ends_the_ranks_elsewhere(place: Place) -> None:
    def follow() -> None:
        with Follower(second(place)) as partners:
            partners.next_stage()
            with pytest.raises(PartnerEnded):
                until(partners.check)
            partners.end([])

    with beside(follow) as results, Lead(place, 20) as partners:
        partners.prepare("one", TWO)
        partners.begin()
        assert partners.end([Failure(3, "rank 0", user_error=True)]) == [Failure(3, "rank 0", user_error=True)]
        assert results.get(timeout=20) is None


def test_a_machine_that_goes_without_a_word_is_the_first_cause(place: Place) -> None:
    def follow() -> None:
        with Follower(second(place)) as partners:
            partners.next_stage()

    with beside(follow), Lead(place, 20) as partners:
        partners.prepare("one", TWO)
        partners.begin()
        with pytest.raises(PartnerEnded):
            until(partners.check)
        failures = partners.end([Failure(time.time(), "connection closed by peer")])
        first = min(failures, key=lambda failure: failure.time)
        assert "machine 1 (" in first.message
        assert "is gone" in first.message
        assert first.user_error


def test_the_first_machine_going_without_a_word_ends_the_others(place: Place) -> None:
    with socket.create_server(("", place.port)) as server, Follower(second(place)) as partners:
        server.accept()[0].close()
        with pytest.raises(PartnerEnded):
            until(partners.check)
        with pytest.raises(UserError, match=f"the first machine .*{place.port}.* is gone"):
            partners.next_stage()


def test_the_end_of_the_run_is_not_lost_on_ranks_that_still_run(place: Place) -> None:
    with socket.create_server(("", place.port)) as server, Follower(second(place)) as partners:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b'{"over": 1}\n')
        with pytest.raises(PartnerEnded):
            until(partners.check)
        assert partners.next_stage() is None


def connected(place: Place) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((place.address, place.port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"machine": "x", "name": 1}\n', b""])
def test_a_stranger_at_the_port_is_turned_away(place: Place, words: bytes) -> None:
    def stray_then_follow() -> str | None:
        with connected(place) as stray:
            stray.sendall(words)
        with Follower(second(place)) as partners:
            return partners.next_stage()

    with beside(stray_then_follow) as results, Lead(place, 20) as partners:
        partners.prepare("one", TWO)
        partners.begin()
        assert results.get(timeout=20) == "one"


def test_a_machine_that_does_not_come_is_named(place: Place) -> None:
    with pytest.raises(UserError, match=r"no word from machine 1, 2 at 127\.0\.0\.1"):
        Lead(Place(0, 3, place.address, place.port), 0.1).__enter__()


def test_a_first_machine_that_does_not_come_is_named(place: Place) -> None:
    with pytest.raises(UserError, match=f"no first machine .* at 127.0.0.1:{place.port}"):
        Follower(second(place), patience=0).__enter__()


def test_a_port_that_is_taken_is_refused(place: Place) -> None:
    with socket.create_server(("", place.port)), pytest.raises(UserError, match=f"MASTER_PORT: {place.port}"):
        Lead(place, 1).__enter__()


@pytest.mark.parametrize(
    ("machine", "machines", "problem", "message"),
    [
        (1, 3, None, r"machine 1 .*launch.machines and version are \(3, .*\) there and \(2, .*\) on the first"),
        (1, 2, "launch.processes: 8, but there are 4 GPUs", "machine 1 .*: launch.processes: 8"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused(
    place: Place, machine: int, machines: int, problem: str | None, message: str
) -> None:
    def follow() -> None:
        with Follower(second(place, machines, machine), problem) as partners:
            assert partners.next_stage() is None  # the first machine says why

    with beside(follow), pytest.raises(UserError, match=message):
        Lead(place, 20).__enter__()


def test_two_machines_with_one_number_are_refused(place: Place) -> None:
    three = Place(0, 3, place.address, place.port)

    def follow() -> None:
        with Follower(second(place, 3)), Follower(second(place, 3)) as again:
            assert again.next_stage() is None

    with beside(follow), pytest.raises(UserError, match="NODE_RANK: 1 is that of"):
        Lead(three, 20).__enter__()


def test_the_place_of_a_machine_is_what_torchrun_calls_it() -> None:
    named = {"NODE_RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "12345"}
    assert find_place(4, None, named) == Place(3, 4, "node0", 12345)
    assert find_place(4, 2222, {**named, "MASTER_PORT": ""}).port == 2222


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODE_RANK": None}, "launch.machines: 4: NODE_RANK must be set"),
        ({"NODE_RANK": None, "MASTER_ADDR": None}, "NODE_RANK and MASTER_ADDR must be set"),
        ({"NODE_RANK": "4"}, "NODE_RANK: '4' is no number from 0 to 3"),
        ({"NODE_RANK": "-1"}, "NODE_RANK: '-1'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000'"),
    ],
)
def test_a_machine_without_a_place_is_refused(changes: dict[str, str | None], message: str) -> None:
    named = {"NODE_RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "12345"} | changes
    with pytest.raises(UserError, match=message):
        find_place(4, None, {name: value for name, value in named.items() if value is not None})


def test_several_machines_are_not_started_from_one() -> None:
    with pytest.raises(UserError, match=r"launch\.machines: 2"):
        Alone().prepare("one", TWO)
