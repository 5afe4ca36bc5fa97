"""Loggers that follow: a thread reads the run folder and tells a service, and the loop never waits for it.

The files of the run folder are the truth. How far a service has been told stands in the run folder too, with the id of
the run there; so a service that is down loses nothing, a run that goes on goes on there as well, and `eclosion sync`
tells the rest later.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from eclosion.redaction import quoted, shown
from eclosion.rundir import RunDir
from eclosion.tracking.feed import Facts, Feed, Row
from eclosion.tracking.tracker import write_json

__all__ = ["Follower", "Opened", "Service", "Standing", "read_standing"]

# Seconds between two looks at the files when nobody says that there is something new.
LOOK_SECONDS = 5.0
# Seconds from one look to the next at least: some steps are told together.
PAUSE_SECONDS = 0.5
# Seconds before a service that failed is tried again: the first, and the longest.
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0
# Seconds that the end of a run waits for a service; it leaves time for the rest of a stop that takes 25.
CLOSE_SECONDS = 15.0
# Rows after which is written down how far a service has been told.
ROWS_TOLD = 100


@dataclass
class Standing:
    """Where a run stands at a service.

    Attributes:
        run_id: its id there.
        place: where that is: project, owner and so on; another place is another run.
        mode: how it was told last, such as "offline".
        url: its address there, if it has one.
        step: the last optimizer step that was told; -1 is none.
        names: the numbers and pictures that were told of it; None is all.
        service_step: the step that the service knows it by: the same, if nothing had to give way.
    """

    run_id: str
    place: dict[str, Any]
    mode: str = ""
    url: str | None = None
    step: int = -1
    names: list[str] | None = field(default_factory=list)
    service_step: int = -1

    def untold(self, row: Row) -> Row | None:
        """What has not been told of a row; None if all of it has."""
        if row.step < self.step or (row.step == self.step and self.names is None):
            return None
        left = row.without(self.names or []) if row.step == self.step else row
        return left if left.names else None

    def told(self, row: Row, service_step: int) -> None:
        """Count a row as told."""
        before = self.names or [] if row.step == self.step else []
        self.step, self.names, self.service_step = row.step, [*before, *row.names], service_step

    def correct(self, last: int) -> None:
        """Believe the service about the last step that it knows."""
        if last == self.service_step:
            return
        self.step, self.names = last - (self.service_step - self.step), None
        self.service_step = last


@dataclass(frozen=True)
class Opened:
    """What a service says of a run when it is opened.

    Attributes:
        url: its address, if it has one.
        last: the last step that it knows; -1 if none, None if it does not say.
        mode: how it is told, such as "offline".
    """

    url: str | None = None
    last: int | None = None
    mode: str = ""


class Service(Protocol):
    """Somebody who is told of runs. All calls but the last come from one thread, may take long and may fail."""

    name: str
    place: Mapping[str, Any]
    run_id: str | None

    def open(self, run: RunDir, standing: Standing, facts: Facts) -> Opened:
        """Begin a run, or go on with it; after a failure, once more."""
        ...

    def describe(self, facts: Facts) -> None:
        """Take note of facts that have changed."""
        ...

    def send(self, row: Row, service_step: int) -> None:
        """Take one row; its step may have to give way to an earlier row's."""
        ...

    def close(self, *, done: bool) -> None:
        """Wait until all has arrived, for some seconds; raises if it has not."""
        ...

    def leave(self) -> None:
        """End at once, from any thread; whatever is under way fails."""
        ...


class Follower:
    """A logger whose numbers come from the run folder.

    Args:
        service: who is told.
        auto_resume: whether a run that goes on continues its own run there; else each start begins a new one, and
            tells it only what follows.
    """

    def __init__(self, service: Service, *, auto_resume: bool = True) -> None:
        self.service, self.auto_resume = service, auto_resume
        self._news: deque[str] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._opened = self._failing = self._unsure = False
        self._deadline = 0.0

    # --- as a logger of a run ----------------------------------------------------------------------------------------

    def start(self, run: RunDir, config: Mapping[str, Any], *, num_steps: int, step: int) -> None:
        """Begin to follow, in a thread."""
        self._prepare(run, config, step if not self.auto_resume else None)
        # A daemon, as a service that hangs must not keep the process.
        self._thread = threading.Thread(target=self._follow, name=f"{self.service.name} follower", daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], *, step: int, samples_seen: int) -> None:
        """There is a new line to read."""
        self._wake.set()

    def log_image(self, path: Path, *, step: int) -> None:
        """A picture goes with the numbers of its step, when there are later ones."""

    def say(self, text: str) -> None:
        """Lines of text are for the terminal."""

    def news(self) -> list[str]:
        """What a person should know of the service, since the last call."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def ending(self) -> None:
        """Tell the rest, as nothing more comes; `close` waits for it."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._ending.set()
        self._wake.set()

    def close(self) -> None:
        """Wait for the service, but not for long; what is left waits in the run folder."""
        if self._thread is None:
            return
        if not self._ending.is_set():
            self.ending()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self.service.leave()
            self._tell(f"has not taken all within {CLOSE_SECONDS:.0f} s; {self._rest()}")
        elif self._failing:
            self._tell(self._rest())

    # --- by hand -----------------------------------------------------------------------------------------------------

    def sync(self, run: RunDir, config: Mapping[str, Any], *, aside: bool = False) -> Standing:
        """Tell a service all that it does not know yet of a run that nobody writes to.

        Args:
            run, config: the run.
            aside: whether it is told of it elsewhere than the run itself tells it; what it knows there is noted apart.

        Raises:
            Exception: whatever the service fails with.
        """
        self._prepare(run, config, None, aside=aside)
        self._step(ending=True, last=True)
        return self._standing

    # --- the thread --------------------------------------------------------------------------------------------------

    def _prepare(self, run: RunDir, config: Mapping[str, Any], fresh_after: int | None, *, aside: bool = False) -> None:
        """Read how far the service has been told, and write down the id before it is used."""
        place = json.dumps([dict(self.service.place), self.service.run_id], sort_keys=True)
        other = f"-{blake2b(place.encode(), digest_size=4).hexdigest()}" if aside else ""
        self._path, self._feed = run.follower(f"{self.service.name}{other}"), Feed(run, config)
        before = read_standing(self._path)
        known = before is not None and before.place == dict(self.service.place)
        known = known and self.service.run_id in (None, before.run_id if before else None)
        if before is not None and known and (fresh_after is None or self.service.run_id):
            self._standing = before
        else:
            self._standing = Standing(self.service.run_id or uuid4().hex[:8], dict(self.service.place))
            if before is not None and fresh_after is not None:
                self._standing.step, self._standing.names = fresh_after, None
        self._run = run
        self._keep()

    def _keep(self) -> None:
        write_json(self._path, asdict(self._standing))

    def _follow(self) -> None:
        """Tell the service, again and again, until the run ends."""
        delay = 0.0
        while True:
            ending = self._ending.is_set()  # before the files are read, so that nothing comes behind the last look
            if ending and self._failing:
                return
            try:
                self._step(ending=ending, last=False)
            except Exception as error:  # noqa: BLE001  (a service fails in ways of its own; the files keep all)
                delay = min(2 * delay or FIRST_DELAY, LONGEST_DELAY)
                self._fails(error)
                self._ending.wait(delay)
                continue
            if ending:
                return
            if self._failing:
                self._tell(f"answers again; all is told up to step {self._standing.step}")
            self._failing, delay = False, 0.0
            self._ending.wait(PAUSE_SECONDS)
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()

    def _step(self, *, ending: bool, last: bool) -> None:
        """Tell what is new."""
        changed = self._feed.look()
        if not self._opened:
            if not (last or self._begun(ending)):
                return
            self._open()
        elif changed:
            self.service.describe(self._feed.facts)
        self._send(last=last or (ending and self._feed.over))
        if ending:
            self._unsure = True
            self.service.close(done=self._feed.over)
            self._opened = self._unsure = False

    def _begun(self, ending: bool) -> bool:
        """Whether the run has said what it runs on, or at its end whether there is something to tell."""
        if not ending:
            return bool(self._feed.facts.environment)
        rows = self._feed.rows(self._standing.step, last=self._feed.over)
        found = any(self._standing.untold(row) for row in rows)
        self._feed.rewind()
        return found

    def _open(self) -> None:
        first = self._standing.mode == ""
        opened = self.service.open(self._run, self._standing, self._feed.facts)
        if first and opened.last is not None:
            self._standing.service_step = max(self._standing.service_step, opened.last)  # somebody else's rows
        elif opened.last is not None:
            self._standing.correct(opened.last)
        if opened.url and self._standing.url != shown(opened.url):
            self._standing.url = shown(opened.url)
            self._tell(self._standing.url)
        self._standing.mode = opened.mode or "online"
        self._opened = True
        self._feed.rewind()
        self._keep()

    def _send(self, *, last: bool) -> None:
        """Tell the rows that are whole."""
        count = 0
        for whole in self._feed.rows(self._standing.step, last=last):
            row = self._standing.untold(whole)
            if row is None:
                continue
            service_step = max(row.step, self._standing.service_step + 1)
            self.service.send(row, service_step)
            self._standing.told(row, service_step)
            count += 1
            if count % ROWS_TOLD == 0:
                self._keep()
        if count:
            self._keep()

    def _fails(self, error: Exception) -> None:
        self._opened = False
        if not self._failing:
            self._failing = True
            self._tell(f"{quoted(str(error)) or type(error).__name__}. Numbers wait in the run folder")

    def _rest(self) -> str:
        """What is left to tell, and how."""
        sync = f"`eclosion sync {self._run.root}`"
        if self._unsure:
            return f"the end of the run may not have arrived: {sync} sends what is missing"
        left = f"what follows step {self._standing.step}" if self._standing.step >= 0 else "the run"
        return f"{left} waits in the run folder: {sync} sends it"

    def _tell(self, text: str) -> None:
        self._news.append(f"{self.service.name}: {text}")


def read_standing(path: Path) -> Standing | None:
    """Where a run stands at a service; None if it has none there, or the file says nothing that can be used."""
    try:
        return Standing(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
