"""Repositories on the Hugging Face hub: the real client against a hub on this machine that does not always work."""

import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from eclosion.config.hub import check_repo_name
from eclosion.config.load import load
from eclosion.errors import ConfigError, EnvironmentProblem, UserError
from eclosion.tracking import hub as hub_module
from eclosion.tracking.hub import Patience, Repository, Unreachable, find_token

QUICK = Patience(tries=3, wait_seconds=0.01, answer_seconds=30)
ONCE = Patience(tries=1, answer_seconds=30)
FILES = {"a/model.safetensors": b"weights" * 999, "a/config.json": b"{}"}


def repository(name="ada/model", **options):
    return Repository(name, **{"patience": QUICK, **options})


def requests_of(hub, method, part):
    return [path for verb, path in hub.requests if verb == method and part in path]


# --- one commit, byte for byte ---


def test_a_push_makes_a_private_repository_and_one_commit_that_holds_the_files(hub):
    pushed = repository().push(FILES, message="first")
    repo = hub.repos["ada/model"]
    assert repo.private
    assert repo.messages == ["first"]
    assert {path: file.data for path, file in repo.files.items() if path != ".gitattributes"} == FILES
    assert pushed.repo == "ada/model"
    assert pushed.commit == repo.head
    assert pushed.url == f"{hub.url}/ada/model"


def test_a_name_without_an_owner_is_that_of_whoever_has_the_token(hub):
    assert repository("model").push(FILES, message="x").repo == "ada/model"


def test_what_is_there_as_it_is_makes_no_second_commit(hub):
    repository().push(FILES, message="first")
    again = repository().push(FILES, message="second")
    assert hub.repos["ada/model"].messages == ["first"]
    assert again.commit == hub.repos["ada/model"].head
    assert len(requests_of(hub, "PUT", "/upload")) == 1


def test_a_folder_is_replaced_in_the_same_commit_and_others_stay(hub):
    mine = {"a/notes.txt": b"mine", "b/old.safetensors": b"mine", "README.md": b"mine"}
    hub.add("ada/model", {"a/old.safetensors": b"old", "a/old/manifest.json": b"old", **mine})
    repository().push(FILES, message="new", replacing=["a"])
    repo = hub.repos["ada/model"]
    assert set(repo.files) == {".gitattributes", *mine, *FILES}
    assert repo.messages == ["new"]


def test_a_page_of_somebodys_own_stays_and_one_of_ours_is_written_anew(hub):
    hub.add("ada/mine", {"README.md": b"# my words"})
    hub.add("ada/ours", {"README.md": b"# old words, written by MARK"})
    for name in ("ada/mine", "ada/ours"):
        repository(name).push({**FILES, "README.md": b"---\na: b\n---\nnew, MARK"}, message="x", keeping="MARK")
    assert hub.repos["ada/mine"].files["README.md"].data == b"# my words"
    assert hub.repos["ada/ours"].files["README.md"].data.endswith(b"new, MARK")


# --- who may see it ---


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_not_as_private_as_wished_gets_nothing(private, hub):
    hub.add("ada/model", private=not private)
    is_, set_ = ("is public, and a private one", "false") if private else ("is private, and a public one", "true")
    with pytest.raises(ConfigError, match=f"{is_}.*Nothing was sent.*private={set_}"):
        repository(private=private).push(FILES, message="x")
    assert hub.repos["ada/model"].messages == []
    assert not requests_of(hub, "PUT", "")


def test_a_hub_that_makes_it_public_though_asked_otherwise_gets_nothing(hub):
    hub.makes_public = True
    with pytest.raises(ConfigError, match=r"is public, and a private one is wanted. Nothing was sent"):
        repository().push(FILES, message="x")
    assert hub.repos["ada/model"].messages == []
    assert not requests_of(hub, "PUT", "")


def test_a_hub_that_calls_it_private_and_shows_it_to_strangers_gets_nothing(hub):
    hub.opens = True
    with pytest.raises(ConfigError, match=r"shown to whoever asks. Nothing was sent"):
        repository().push(FILES, message="x")
    assert hub.repos["ada/model"].messages == []


def test_a_repository_that_was_opened_between_two_saves_gets_no_second(hub):
    kept = repository()
    kept.push(FILES, message="first")
    hub.repos["ada/model"].private = False
    with pytest.raises(ConfigError, match="is public"):
        kept.push({"b.safetensors": b"more"}, message="second")
    assert hub.repos["ada/model"].messages == ["first"]


def test_a_public_repository_is_made_only_where_that_is_wished(hub):
    repository(private=False).push(FILES, message="x")
    assert not hub.repos["ada/model"].private


# --- what goes wrong ---


@pytest.mark.parametrize(
    "request_that_fails",
    ["POST /api/repos/create", "GET /api/models/ada/model$", "POST .*/commit/", "GET .*/tree/", "PUT /upload"],
)
def test_an_error_of_the_server_is_tried_again_and_one_commit_comes_of_it(request_that_fails, hub):
    hub.fail(request_that_fails, 500)
    repository().push(FILES, message="x")
    assert hub.repos["ada/model"].messages == ["x"]


@pytest.mark.parametrize("request_that_fails", ["POST .*/commit/", "POST /api/repos/create", "PUT /upload"])
def test_a_connection_that_breaks_is_tried_again_and_one_commit_comes_of_it(request_that_fails, hub):
    hub.fail(request_that_fails, None)
    repository().push(FILES, message="x")
    assert hub.repos["ada/model"].messages == ["x"]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub):
    hub.add("ada/model", {"a/old.json": b"{}"})
    hub.fail("POST .*/commit/", None, after=True)
    repository().push(FILES, message="x", replacing=["a"])
    assert hub.repos["ada/model"].messages == ["x"]


def test_a_commit_of_somebody_else_in_between_is_not_lost(hub):
    repo = hub.add("ada/model")
    original = type(repo).head.fget
    theirs = []

    def head(self):
        if not theirs and requests_of(hub, "POST", "/commit/"):
            theirs.append(True)
            self.commit("theirs", {**self.files, "theirs.json": self.files[".gitattributes"]})
        return original(self)

    type(repo).head = property(head)
    try:
        repository().push(FILES, message="ours")
    finally:
        type(repo).head = property(original)
    assert repo.messages == ["theirs", "ours"]
    assert {"theirs.json", *FILES} <= set(repo.files)


def test_an_upload_that_the_hub_drops_is_an_error(hub):
    hub.loses_uploads = True
    with pytest.raises(EnvironmentProblem, match=r"does not hold a/model.safetensors as it was sent.*copy is whole"):
        repository().push(FILES, message="x")


def test_an_upload_that_the_hub_cuts_short_is_an_error(hub):
    hub.cuts_uploads = True
    with pytest.raises(EnvironmentProblem, match=r"does not hold a/model.safetensors as it was sent"):
        repository().push(FILES, message="x")


def test_a_hub_that_keeps_failing_is_one_line_without_anything_secret(hub, caplog):
    hub.fail("POST .*/commit/", 503, times=99)
    with caplog.at_level(logging.WARNING), pytest.raises(Unreachable) as error:
        repository().push(FILES, message="x")
    said = str(error.value)
    assert "cannot be reached, after 3 tries: " in said
    assert "503" in said
    assert "\n" not in said
    assert error.value.exit_code == 4
    for secret in ("canary", "Signature"):
        assert secret not in said + caplog.text
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_a_failed_upload_does_not_show_its_signed_address(hub, caplog, capfd):
    hub.fail("PUT /upload", 403, times=99)
    with caplog.at_level(logging.DEBUG, logger="huggingface_hub"), pytest.raises(UserError) as error:
        repository(patience=ONCE).push(FILES, message="x")
    out, err = capfd.readouterr()
    assert "Signature" not in str(error.value) + caplog.text + out + err


def test_a_hub_that_says_nothing_is_left_after_a_while(hub):
    hub.fail("GET /api/models", 0, times=99)
    with pytest.raises(Unreachable, match=r"no answer in 0.3 s"):
        repository(patience=Patience(tries=1, answer_seconds=0.3)).prepare()
    hub.silent.set()


def test_a_hub_that_is_not_there_is_told_of(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"http://127.0.0.1:9/ada/model: cannot be reached"):
        repository().prepare()


@pytest.mark.parametrize("body", [b"<html>Log in to this network</html>", b'{"error": "none"}', b"[]", b"null"])
def test_a_server_that_is_no_hub_is_told_of(body, hub, monkeypatch):
    monkeypatch.setattr(sys.modules["hub_server"].Handler, "info", lambda *_, **__: (200, body, {}))
    with pytest.raises(EnvironmentProblem, match=r"does not answer as the hub does .*Check HF_ENDPOINT"):
        repository().prepare()


def test_offline_mode_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        repository().prepare()


def test_a_namespace_of_others_is_refused(hub):
    with pytest.raises(ConfigError, match=r"may not do that.*403"):
        repository("bob/model").prepare()


def test_a_file_that_is_gone_is_named(hub, tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"a.json: cannot be read .No such file"):
        repository().push({"a.json": tmp_path / "a.json"}, message="x")


# --- the token ---


def test_the_token_comes_from_the_environment_or_from_a_file_of_mode_0600(hub, tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text("hf_fromFile\n")
    path.chmod(0o600)
    assert find_token(path) == os.environ["HF_TOKEN"]  # as the original does, which takes the file when not logged in
    monkeypatch.delenv("HF_TOKEN")
    assert find_token(path) == "hf_fromFile"
    assert find_token() is None
    login = Path(constants.HF_TOKEN_PATH)
    login.parent.mkdir()
    shutil.copyfile(path, login)
    login.chmod(0o600)
    assert find_token() == "hf_fromFile"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o660])
def test_a_token_that_others_may_read_is_refused(mode, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    path = tmp_path / "token"
    path.write_text("hf_secretWord")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"others than its owner may read.*Run: chmod 600") as error:
        repository(token_path=path)
    assert "secretWord" not in str(error.value)


@pytest.mark.parametrize("content", ["", "two words", "x" * 5000, "hf_ä"])
def test_a_file_that_holds_no_token_is_refused_without_repeating_it(content, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="does not hold a token") as error:
        find_token(path)
    assert not content or content not in str(error.value)


@pytest.mark.parametrize("key", ["hub", "save", "start"])
def test_a_token_in_the_place_of_a_path_is_refused_without_repeating_it(key):
    token = "hf_canaryCanaryCanaryCanary"
    part = {"name": "huggingface", "repo": "ada/model", "token_path": token}
    told = {"hub": {"repo": "ada/model", "token_path": token}}
    told |= {"save": {"save": [{**part, "latest": "latest"}]}, "start": part}
    section = "track" if key == "save" else key
    with pytest.raises(ConfigError, match="token_path: is a token, and must be the path") as error:
        load({"output": "runs/a", "data": {"source": "butterflies"}, section: told[key]})
    assert "canary" not in str(error.value)


def test_a_pipe_is_no_file_with_a_token(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    os.mkfifo(tmp_path / "token", 0o600)
    with pytest.raises(ConfigError, match="is no file"):
        find_token(tmp_path / "token")


def test_without_a_token_nothing_is_asked(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"there is no token.*Set HF_TOKEN"):
        repository().prepare()
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know_is_refused_without_showing_it(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongCanary")
    for name in ("model", "ada/model"):
        with pytest.raises(ConfigError, match="does not take your token") as error:
            repository(name).prepare()
        assert "wrongCanary" not in str(error.value)


def test_a_token_is_sent_to_the_hub_alone(hub):
    """Uploads go to addresses that are signed, perhaps of another company."""
    repository().push(FILES, message="x")
    sent = [token for (verb, _), token in zip(hub.requests, hub.tokens, strict=True) if verb == "PUT"]
    assert sent == [None]


def test_a_token_is_not_sent_unencrypted_to_another_machine(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.org")
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT is http://hub.example.org, and must be an https"):
        repository()


def test_a_file_that_holds_the_token_is_not_sent(hub):
    with pytest.raises(EnvironmentProblem, match=r"notes.json: holds your token"):
        repository().push({"notes.json": f'{{"x": "{os.environ["HF_TOKEN"]}"}}'.encode()}, message="x")
    assert hub.requests == []


# --- names, and threads ---


@pytest.mark.parametrize("name", ["model", "ada/model", "a.b_c-d/x.y"])
def test_a_repository_has_a_name(name):
    assert check_repo_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "/model", "a/b/c", "<you>/<model>", "a b", "../x", "a--b", "x.git", "a/.b", "ä/b"]
)
def test_what_is_no_name_of_a_repository_is_refused(name):
    with pytest.raises(ValueError, match="is not the name of a repository"):
        check_repo_name(name)


def test_the_client_may_warn_again_when_the_last_of_several_threads_is_done(hub):
    """Its log and its progress bars belong to whoever else uses it in this process."""
    log, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    before = log.level
    with hub_module._QUIET:
        with hub_module._QUIET:
            pass
        assert (log.level, are_progress_bars_disabled()) == (logging.ERROR, True)
    assert (log.level, not are_progress_bars_disabled()) == (before, shown)


def test_a_repository_can_be_pushed_to_from_a_thread(hub):
    failures = []

    def push():
        try:
            repository().push(FILES, message="x")
        except UserError as error:
            failures.append(error)

    thread = threading.Thread(target=push)
    thread.start()
    thread.join()
    assert failures == []
    assert hub.repos["ada/model"].messages == ["x"]
