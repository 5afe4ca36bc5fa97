"""Commands as files: only where allowed, without a shell where none is needed, and never for ever."""

import os
import threading
import time
from pathlib import Path

import pytest

from eclosion.data.download import download
from eclosion.data.pipes import argv_of, pipes_allowed
from eclosion.data.places import Patience, Place, Stopped
from eclosion.data.remote import stat
from eclosion.errors import ConfigError, DataError, EnvironmentProblem

SECRET = "hunter2-s3cr3t"
QUICK = Patience(deadline_seconds=1, first_wait_seconds=0.01, timeout_seconds=1, window_seconds=0.4)


@pytest.mark.parametrize(
    "command", ["cat /data/0.tar", "aws s3 cp 's3://b/0.tar' -", r"cat a\ b", "echo 'a|b' \"c;d\""]
)
def test_a_plain_command_is_run_without_a_shell(command):
    assert argv_of(f"pipe:{command}")[0] == command.split()[0]


@pytest.mark.parametrize(
    "command",
    ["cat a | gzip -d", "cat < a", "cat a; cat b", "cat a && true", "cat $HOME/a", 'cat "$HOME"', "cat `pwd`/a",
     "cat *.tar", "cat a?", "(cat a)", "cat ~/a", "A=b cat a", "cat {a,b}", "cat a # b", "cat a\ncat b"],
)  # fmt: skip
def test_a_command_with_shell_syntax_is_run_by_a_shell(command):
    assert argv_of(f"pipe:{command}") == ["/bin/sh", "-c", command]


def test_quotes_and_backslashes_hide_syntax_from_the_shell_and_reach_the_program_as_they_should(tmp_path):
    with pipes_allowed():
        download(Place(r"""pipe:printf %s '$HOME|"x"' a\;b "c'd" """.strip(), None, ""), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"""$HOME|"x\"""" + b"""a;bc'd"""


@pytest.mark.parametrize(
    ("command", "why"), [("", "no command"), ("cat 'a", "cannot be read"), ("cat \0", "no command")]
)
def test_what_is_no_command_is_refused(command, why):
    with pipes_allowed(), pytest.raises(ConfigError, match=why):
        stat(f"pipe:{command}")


def test_a_command_runs_only_where_it_is_allowed(tmp_path):
    url = f"pipe:touch {tmp_path}/ran.json"
    place = Place(url, None, "")
    for ask in (lambda: stat(url), lambda: download(place, tmp_path / "out")):
        with pytest.raises(ConfigError, match="add --allow-pipe"):
            ask()
    with pipes_allowed():
        with pipes_allowed():
            pass
        assert stat(url) == place  # does not run it
        assert list(tmp_path.iterdir()) == []
        thread = threading.Thread(target=download, args=(place, tmp_path / "out"))  # as fetching ahead does
        thread.start()
        thread.join()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ran.json"]
    with pytest.raises(ConfigError, match="add --allow-pipe"):
        stat(url)


@pytest.mark.parametrize("command", ["cat {}", "cat {} | cat", "cat < {}"])
def test_a_command_gives_the_bytes_of_the_file(tmp_path, command):
    source, to = tmp_path / "0.tar", tmp_path / "out"
    source.write_bytes(os.urandom(3_000_000))
    with pipes_allowed():
        fetched = download(Place("pipe:" + command.replace("{}", str(source)), None, ""), to)
    assert to.read_bytes() == source.read_bytes()
    assert (fetched.size, fetched.version) == (3_000_000, "")


def test_a_command_that_fails_is_an_error_with_its_last_words_and_is_run_once(tmp_path):
    log = tmp_path / "log"
    words = f"(echo first; printf 'no \\033 {SECRET} http://u:p@h/x?y=1 %0500d' 7) >&2"
    url = f"pipe:echo run >> {log}; echo some; {words}; exit 3"
    with pipes_allowed(), pytest.raises(DataError) as caught:
        download(Place(url, None, ""), tmp_path / "out", patience=QUICK)
    assert "failed with exit code 3: no \\x1b ... http://h/x 0000" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert SECRET not in str(caught.value)
    assert log.read_text() == "run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pipes_allowed(), pytest.raises(EnvironmentProblem, match="'no-such-program' cannot be started"):
        download(Place("pipe:no-such-program 0.tar", None, ""), tmp_path / "out")


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it may end between opening and reading
        return False


def gone(pid_file):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if not is_alive(int(pid_file.read_text())):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("command", ["sleep 1000", "echo begin; sleep 1000 | cat", "exec >&-; sleep 1000"])
def test_a_command_that_hangs_is_ended_with_all_it_has_started(tmp_path, command):
    url = f"pipe:sleep 1000 & echo $! > {tmp_path}/pid; {command}"
    start = time.monotonic()
    with pipes_allowed(), pytest.raises(DataError, match=r"only .* bytes came in 0.4 s. The command was ended"):
        download(Place(url, None, ""), tmp_path / "out", patience=QUICK)
    assert time.monotonic() - start < 3
    assert gone(tmp_path / "pid")
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_a_command_without_end_is_ended_at_the_limit(tmp_path):
    with pipes_allowed(), pytest.raises(DataError, match="has more than 1000000 bytes"):
        download(Place("pipe:yes", None, ""), tmp_path / "out", max_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_ended_when_its_file_is_not_wanted_any_more(tmp_path):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    url = f"pipe:echo $$ > {tmp_path}/pid; exec sleep 1000"
    with pipes_allowed(), pytest.raises(Stopped):
        download(Place(url, None, ""), tmp_path / "out", stop=stop)
    assert gone(tmp_path / "pid")
