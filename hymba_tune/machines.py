"""A run on several machines: the first runs the stages, the others join its training.

    first machine   Lead       gather -> (data, scores) -> begin -> its ranks, check -> end -> next stage -> leave
    each other      Follower                               order -> its ranks, check -> end -> order      -> leave

A connection to each machine stays open as long as the run does, with lines of JSON on it. When it breaks, whoever was
at its other end has ended; then the ranks here are ended too, and nobody waits for ever. A message names a stage of the
recipe that both have read, never code and never a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Protocol

from hymba_tune import __version__
from hymba_tune.errors import UserError
from hymba_tune.topology import DEFAULT_PORT, Topology, free_port

GATHER_SECONDS = 600.0
"""How long machines wait for each other: nodes of a job do not start in one moment."""
END_SECONDS = 60.0
"""How long the first machine waits for the others' ranks to end: more than launch.py gives ranks."""
_HELLO_SECONDS, _RETRY_SECONDS = 10.0, 1.0
_LONGEST_MESSAGE = 2**20


@dataclass(frozen=True)
class Place:
    """Which machine this is, and where the first one (machine 0) listens."""

    machine: int
    machines: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Failure:
    """What went wrong in ranks or with a machine; `time`: seconds since 1970, 0 for what must be the first cause."""

    time: float
    message: str
    user_error: bool = False


class PartnerEnded(Exception):
    """Another machine has failed, is gone or says that it is over: the ranks of this one are to end."""


class Partners(Protocol):
    """The other machines of a training, as launch.py sees them."""

    def prepare(self, stage: str, topology: Topology) -> Topology:
        """Where this machine's ranks of a stage are and meet the others."""

    def begin(self) -> None:
        """The ranks of this machine are about to start."""

    def check(self) -> None:
        """Raises PartnerEnded where the ranks of this machine are to end."""

    def end(self, failures: Sequence[Failure]) -> list[Failure]:
        """The ranks of this machine have ended; returns what went wrong anywhere."""


class Alone:
    """There is no other machine."""

    def prepare(self, stage: str, topology: Topology) -> Topology:
        if topology.machines > 1:
            raise UserError(f"launch.machines: {topology.machines}: start it on each of them with hymba-tune run")
        return topology

    def begin(self) -> None: ...

    def check(self) -> None: ...

    def end(self, failures: Sequence[Failure]) -> list[Failure]:
        return list(failures)


def find_place(machines: int, port: int | None, environment: Mapping[str, str] | None = None) -> Place:
    """This machine's place among several, from NODE_RANK, MASTER_ADDR and MASTER_PORT, as torchrun's users set them.

    Args:
        port: the recipe's, where MASTER_PORT is not set.
        environment: default: this process' own.

    Raises:
        UserError: one of them is missing or can't be.
    """
    environment = os.environ if environment is None else environment
    needed = f"launch.machines: {machines}"
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{needed}: {' and '.join(missing)} must be set on each machine; the scripts of `hymba-tune launch slurm` "
            "and `hymba-tune launch hosts` do it"
        )
    machine = _number(environment["NODE_RANK"], "NODE_RANK", needed, 0, machines - 1)
    at = _number(environment.get("MASTER_PORT") or str(port or DEFAULT_PORT), "MASTER_PORT", needed, 1, 65535)
    return Place(machine, machines, environment["MASTER_ADDR"], at)


def _number(text: str, name: str, needed: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name}: {text!r} is no number from {least} to {most} ({needed})")
    return int(text)


class _Link:
    """Lines of JSON, each an object, over a connection. Methods raise ConnectionError when the other side is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._read = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a machine without power is noticed after two minutes
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        self._connection.settimeout(_HELLO_SECONDS)
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ConnectionError(str(error)) from None

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """The next message; None where none has come within so many seconds (None: for ever)."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._read:
            self._connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0))
            try:
                piece = self._connection.recv(2**16)
            except (BlockingIOError, TimeoutError) as error:
                if error.errno == errno.ETIMEDOUT:  # not our waiting: the kernel has given the connection up
                    raise ConnectionError("timed out") from None
                return None
            except OSError as error:
                raise ConnectionError(str(error)) from None
            self._read += piece
            if not piece or len(self._read) > _LONGEST_MESSAGE:
                raise ConnectionError("closed")
        line, _, self._read = self._read.partition(b"\n")
        return _object(line)

    def close(self) -> None:
        self._connection.close()


def _object(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        raise ConnectionError("no JSON") from None
    if not isinstance(message, dict):
        raise ConnectionError("no JSON object")
    return message


class Lead:
    """The first machine's connections to all others. Entered: listens, and waits until all have come.

    Raises:
        UserError: the port is taken, or a machine did not come, runs another version or has a problem of its own.
    """

    def __init__(self, place: Place, patience: float = GATHER_SECONDS) -> None:
        self._place, self._patience = place, patience
        self._links: dict[int, _Link] = {}
        self._names: dict[int, str] = {}
        self._order: dict[str, Any] = {}
        self._done: dict[int, Failure | None] = {}

    def __enter__(self) -> Lead:
        try:
            server = _listen(self._place.port)
        except OSError as error:
            raise UserError(
                f"MASTER_PORT: {self._place.port} can't be listened on ({error.strerror}); set another on all machines"
            ) from None
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._leave)
            with server:
                self._gather(server)
            cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        for link in self._links.values():
            _part(link)

    def _gather(self, server: socket.socket) -> None:
        deadline = time.monotonic() + self._patience
        while missing := sorted(set(range(1, self._place.machines)) - self._links.keys()):
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"launch.machines: {self._place.machines}: no word from machine {', '.join(map(str, missing))} at "
                    f"{self._place} within {self._patience:.0f} s; look at the output there (NODE_RANK says which)"
                ) from None
            self._welcome(_Link(connection))

    def _welcome(self, link: _Link) -> None:
        """Take a machine in; who does not speak as one is turned away."""
        try:
            hello = link.receive(_HELLO_SECONDS) or {}
            machine, name = int(hello["machine"]), str(hello["name"])
        except (ConnectionError, KeyError, TypeError, ValueError):
            link.close()
            return
        known = self._links.get(machine)
        if known is not None and _is_gone(known):
            known.close()
            known = None
        mine, theirs = (self._place.machines, __version__), (hello.get("machines"), hello.get("version"))
        problem = hello.get("problem")
        if mine != theirs:
            problem = f"launch.machines and version are {theirs} there and {mine} on the first; make them the same"
        elif known is not None:
            problem = f"NODE_RANK: {machine} is that of {self._names[machine]} already; give each machine its own"
        if problem:
            _part(link)
            raise UserError(f"machine {machine} ({name}): {problem}")
        self._links[machine], self._names[machine] = link, name

    def prepare(self, stage: str, topology: Topology) -> Topology:
        """A stage on this machine alone stays as it is; one on all meets at a free port of this one."""
        if topology.machines == 1:
            self._order = {}
            return topology
        port = free_port()
        self._order = {"train": stage, "port": port}
        return replace(topology, machine=0, address=self._place.address, port=port)

    def begin(self) -> None:
        self._done = {}
        if self._order:
            self._tell(self._links, **self._order)

    def check(self) -> None:
        if self._order:
            for machine in self._links.keys() - self._done.keys():
                with self._noticed(machine):
                    self._note(machine, self._links[machine].receive(0))
            if any(self._done.values()):
                raise PartnerEnded

    def end(self, failures: Sequence[Failure]) -> list[Failure]:
        """Wait for the others, told to end if ranks have failed anywhere."""
        if not self._order:
            return list(failures)
        if failures or any(self._done.values()):
            self._tell(self._links.keys() - self._done.keys(), stop=True)
        deadline = time.monotonic() + END_SECONDS
        for machine in self._links.keys() - self._done.keys():
            with self._noticed(machine):
                message = self._links[machine].receive(max(deadline - time.monotonic(), 0))
                if message is None:
                    raise ConnectionError(f"no word within {END_SECONDS:.0f} s")
                self._note(machine, message)
        return [*failures, *filter(None, self._done.values())]

    def _tell(self, machines: Iterable[int], **message: Any) -> None:
        for machine in machines:
            with self._noticed(machine):
                self._links[machine].send(**message)

    def _note(self, machine: int, message: dict[str, Any] | None) -> None:
        if message is not None:
            self._done[machine] = _failure(message.get("done"))

    @contextlib.contextmanager
    def _noticed(self, machine: int) -> Iterator[None]:
        """If the connection to a machine turns out to be broken, the machine has failed."""
        try:
            yield
        except ConnectionError as error:
            where = f"machine {machine} ({self._names[machine]})"
            self._done[machine] = Failure(0, f"{where} is gone ({error}); its own output says why", user_error=True)


class Follower:
    """Another machine's connection to the first. Entered: connected, and `problem` (what is wrong here) is said.

    Raises:
        UserError: nobody listens there, or the first machine has gone without a word.
    """

    def __init__(self, place: Place, problem: str | None = None, patience: float = GATHER_SECONDS) -> None:
        self._place, self._problem, self._patience = place, problem, patience
        self._port, self._over = 0, False

    def __enter__(self) -> Follower:
        self._link = _Link(_connect(self._place, self._patience))
        hello = {"machine": self._place.machine, "machines": self._place.machines, "name": socket.gethostname()}
        with contextlib.suppress(ConnectionError):  # next_stage says it
            self._link.send(**hello, version=__version__, problem=self._problem)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._link.close()

    def next_stage(self) -> str | None:
        """The stage to join in next; None when the run is over, however it ended: the first machine says that."""
        while not self._over:
            try:
                message = self._link.receive(None) or {}
            except ConnectionError:
                raise UserError(f"the first machine ({self._place}) is gone; its own output says why") from None
            if "train" in message:  # and no `stop` of a training that had ended here before it came
                self._port = int(message["port"])
                return str(message["train"])
            self._over = "over" in message
        return None

    def prepare(self, stage: str, topology: Topology) -> Topology:
        return replace(topology, machine=self._place.machine, address=self._place.address, port=self._port)

    def begin(self) -> None: ...

    def check(self) -> None:
        try:
            message = self._link.receive(0)
        except ConnectionError as error:
            raise PartnerEnded from error
        if message is not None:
            self._over = "over" in message
            raise PartnerEnded

    def end(self, failures: Sequence[Failure]) -> list[Failure]:
        """Tell the first machine, which says it to the user."""
        first = min(failures, key=lambda failure: failure.time, default=None)
        with contextlib.suppress(ConnectionError):
            self._link.send(done=None if first is None else asdict(first))
        return list(failures)


def _failure(value: object) -> Failure | None:
    if not isinstance(value, dict):
        return None
    return Failure(float(value["time"]), str(value["message"]), bool(value["user_error"]))


def _part(link: _Link) -> None:
    """Close a connection with a word, so that the other side does not take it for a crash."""
    with contextlib.suppress(ConnectionError):
        link.send(over=True)
    link.close()


def _is_gone(link: _Link) -> bool:
    try:
        link.receive(0)
    except ConnectionError:
        return True
    return False


def _listen(port: int) -> socket.socket:
    """On every address of this machine: its name may stand for another one here than elsewhere."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _connect(place: Place, patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((place.address, place.port), timeout=_HELLO_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR, MASTER_PORT: no first machine (NODE_RANK 0) at {place} within {patience:.0f} s "
                    f"({error}); look at its output, and whether that port is open to this machine"
                ) from None
        else:
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # on one machine a connection can meet itself, where nobody listens yet
        time.sleep(_RETRY_SECONDS)
