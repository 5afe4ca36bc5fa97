"""What a run starts from, in order, and what becomes of its checkpoints while it goes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclosion import export, sample, train
from eclosion.checkpoint import storage
from eclosion.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, Interrupted
from eclosion.rundir import RunDir
from eclosion.tracking.local import LocalCopies

LAST = "step-00000012"


@pytest.fixture(scope="module")
def saved(uninterrupted, tmp_path_factory):
    """A finished run with its copies: the checkpoint of each save, the newest model, and the run."""
    folder = tmp_path_factory.mktemp("saved")
    each = {"name": "local", "root": str(folder), "latest": "each/{step:02d}.pth", "meta": "about"}
    model = {"name": "local", "root": str(folder), "latest": "model.pth", "kind": "model"}
    config = json.loads((uninterrupted / "config.json").read_text())
    config["track"]["save"] = [each, model]
    train({**config, "output": str(folder / "run")})
    return folder


def stop_when(path, number):
    """Send this process a signal as soon as a file appears."""

    def watch():
        for _ in range(12_000):
            if path.exists():
                break
            threading.Event().wait(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture
def make_config(make_config):
    """The same with sections that the tiny config does not have."""

    def made(output, **sections):
        more = {name: sections.pop(name) for name in ("start", "validate") if name in sections}
        return make_config(output, **sections) | more

    return made


def starting(make_config, output, path, **sections):
    return make_config(output, start={"name": "local", "path": str(path)}, **sections)


def events(run):
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]


def weights(run, entry="unet", step=LAST):
    return load_file(run / "checkpoints" / step / f"{entry}.safetensors")


# --- saved, and gone on with -----------------------------------------------------------------------------------------


def test_a_run_with_savers_is_bitwise_the_run_without(saved, uninterrupted, results):
    assert results(saved / "run") == results(uninterrupted)


def test_every_checkpoint_was_copied_though_the_run_keeps_two(saved):
    assert [path.name for path in sorted((saved / "each").iterdir())] == ["03.pth", "06.pth", "09.pth", "12.pth"]
    assert [storage.verify(path).step for path in sorted((saved / "each").iterdir())] == [3, 6, 9, 12]
    assert (saved / "about" / "config.json").read_bytes() == (saved / "run" / "config.json").read_bytes()
    assert not list(RunDir(saved / "run").outbox.iterdir())


def test_a_run_that_starts_from_a_copy_goes_on_bitwise(saved, make_config, uninterrupted, results, tmp_path):
    train(starting(make_config, tmp_path / "run", saved / "each" / "06.pth"))
    ours, theirs = results(tmp_path / "run"), results(uninterrupted)
    assert ours["hashes"] == theirs["hashes"]
    assert ours["numbers"] == [line for line in theirs["numbers"] if line["step"] > 6]
    meta = storage.read_manifest(tmp_path / "run" / "checkpoints" / LAST).meta
    assert meta["started_from"] == str(saved / "each" / "06.pth")
    assert meta["start"] == {"loader": "local", "path": str(saved / "each" / "06.pth")}


def test_another_run_is_started_from_by_its_newest_checkpoint(saved, make_config, tmp_path):
    train(starting(make_config, tmp_path / "run", saved / "run", train={"duration": "13 steps"}), accept_changes=True)
    assert f"resuming at step 12 of 13, from {saved / 'run' / 'checkpoints' / LAST}" in events(tmp_path / "run")


def test_a_checkpoint_of_another_config_is_refused(saved, make_config, tmp_path):
    with pytest.raises(ConfigError, match="seed: 0 -> 1 would make it another run than the one in"):
        train(starting(make_config, tmp_path / "run", saved / "each" / "06.pth", seed=1))


def test_its_own_checkpoint_comes_before_start(saved, make_config, results, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "run", run)
    train(starting(make_config, run, saved / "nothing here"))
    assert results(run) == results(saved / "run")


def test_a_checkpoint_that_resume_names_comes_before_start(saved, make_config, tmp_path):
    train(starting(make_config, tmp_path / "run", saved / "nothing here"), resume=str(saved / "each" / "09.pth"))
    assert f"resuming at step 9 of 12, from {saved / 'each' / '09.pth'}" in events(tmp_path / "run")


def test_only_when_resuming_leaves_a_new_run_alone(saved, make_config, tmp_path):
    start = {"name": "local", "path": str(saved / "nothing here"), "only_when_resuming": True}
    train(make_config(tmp_path / "run", start=start, train={"duration": "1 steps"}))
    assert events(tmp_path / "run")[0] == "training from scratch, 1 steps"


def test_only_when_resuming_brings_back_a_run_whose_checkpoints_are_gone(
    saved, make_config, uninterrupted, results, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(saved / "run", run)
    shutil.rmtree(run / "checkpoints")
    start = {"name": "local", "path": str(saved / "each" / "06.pth"), "only_when_resuming": True}
    train(make_config(run, start=start))
    assert results(run) == results(uninterrupted)
    assert "replaced" not in " ".join(events(run))


# --- weights alone ---------------------------------------------------------------------------------------------------


def as_pipeline(saved, tmp_path):
    return export(saved / "run", tmp_path / "pipeline")


def as_network(saved, tmp_path):
    return as_pipeline(saved, tmp_path) / "unet"


def as_shards(saved, tmp_path):
    """The same in two files and an index, as diffusers saves what is large."""
    folder = as_network(saved, tmp_path)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def two_processes(config, folder):
    """What torchrun says of a config, and its exit code."""
    (folder / "run.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("train_config.py")
    done = subprocess.run(
        [*command, script, folder / "run.json"], capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout + done.stderr


def as_file(saved, tmp_path):
    return shutil.copy(
        as_network(saved, tmp_path) / "diffusion_pytorch_model.safetensors", tmp_path / "net.safetensors"
    )


def as_model(saved, tmp_path):
    return saved / "model.pth"


@pytest.mark.parametrize("form", [as_model, as_pipeline, as_network, as_shards, as_file])
def test_weights_in_any_form_are_put_into_the_network_and_its_averages(form, saved, make_config, tmp_path):
    path = form(saved, tmp_path)
    still = {"optimizer": {"learning_rate": 1e-30}, "train": {"duration": "1 steps"}, "sample": {"num_images": 0}}
    train(starting(make_config, tmp_path / "run", path, **still))
    wanted = weights(saved / "run", "unet.ema")
    for entry in ("unet", "unet.ema", "unet.ema-0.3"):
        torch.testing.assert_close(weights(tmp_path / "run", entry, "step-00000001"), wanted, rtol=0, atol=1e-12)
    assert events(tmp_path / "run")[0] == f"training from the weights in {path}, 1 steps"


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (as_model, "the weights are from a run with another task.prediction_type: 'v_prediction' -> 'epsilon'"),
        (as_pipeline, "the weights of unet were made with prediction_type 'v_prediction', and this run has 'epsilon'"),
    ],
)
def test_weights_for_another_purpose_that_fit_all_the_same_are_told(form, said, saved, make_config, tmp_path):
    config = starting(make_config, tmp_path / "run", form(saved, tmp_path), train={"duration": "1 steps"})
    config["task"]["prediction_type"] = "epsilon"
    train(config)
    assert [line for line in events(tmp_path / "run") if line.startswith("the weights")] == [said]


def test_another_number_of_heads_is_told_though_the_weights_fit(saved, make_config, tmp_path):
    config = starting(make_config, tmp_path / "run", as_network(saved, tmp_path), train={"duration": "1 steps"})
    config["task"]["model"]["options"]["attention_head_dim"] = 8
    train(config)
    said = "the weights of unet were made with attention_head_dim 4, and this run has 8"
    assert said in events(tmp_path / "run")


def test_a_model_is_sampled_and_exported_as_the_run_it_is_of(saved, tmp_path):
    of_run = sample(saved / "run", num_images=2, num_inference_steps=2, out=tmp_path / "a")
    of_model = sample(saved / "model.pth", num_images=2, num_inference_steps=2, out=tmp_path / "b")
    for name in ("000000.png", "000001.png"):
        assert (of_run / name).read_bytes() == (of_model / name).read_bytes()
    pipeline = export(saved / "model.pth", tmp_path / "pipeline")
    file = "unet/diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(
        load_file(pipeline / file), weights(saved / "run", "unet.ema"), rtol=0, atol=0, check_stride=False
    )


def test_what_is_made_with_a_copy_is_not_put_into_it(saved, tmp_path):
    copy = tmp_path / "models" / "latest"
    shutil.copytree(saved / "model.pth", copy)
    made = sample(copy, num_images=1, num_inference_steps=1)
    assert made.is_relative_to(tmp_path / "models" / "samples")
    assert storage.verify(copy).step == 12


def _missing(tensors):
    tensors.pop("conv_in.bias")


def _unknown(tensors):
    tensors["extra"] = torch.zeros(1)


def _reshaped(tensors):
    tensors["conv_in.bias"] = torch.zeros(3)


def _halved(tensors):
    tensors["conv_in.bias"] = tensors["conv_in.bias"].half()


def _not_finite(tensors):
    tensors["conv_in.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_missing, r"does not fit the networks of this run: unet: conv_in\.bias is missing\."),
        (_unknown, r"does not fit the networks of this run: unet: extra is not known\."),
        (_reshaped, r"unet: conv_in\.bias is \[3\], wanted \[16\]\."),
        (_halved, r"unet: conv_in\.bias is float16, wanted float32\."),
        (_not_finite, r"unet: conv_in\.bias is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_made(change, said, saved, make_config, tmp_path):
    tensors = load_file(saved / "model.pth" / "unet.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=said):
        train(starting(make_config, tmp_path / "run", tmp_path / "net.safetensors"))
    assert not RunDir(tmp_path / "run").checkpoints.exists()
    assert not RunDir(tmp_path / "run").config.exists()


def test_a_damaged_model_is_refused(saved, make_config, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(saved / "model.pth", model)
    raw = bytearray((model / "unet.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "unet.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="its sha256 is not the one in manifest"):
        train(starting(make_config, tmp_path / "run", model))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"not a model"), "is nothing that a run can start from"),
        (lambda path: path.mkdir(), "holds no diffusion_pytorch_model.safetensors"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_nobody_can_start_from_is_refused(make, said, make_config, tmp_path):
    make(tmp_path / "thing")
    with pytest.raises((DataError, CheckpointError), match=said):
        train(starting(make_config, tmp_path / "run", tmp_path / "thing"))


def test_a_file_of_torch_that_is_no_decoder_is_refused_and_not_run(make_config, tmp_path):
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "latest.pth")
    with pytest.raises(ConfigError, match="is a checkpoint of DALLE2-pytorch's decoder, and task is not"):
        train(starting(make_config, tmp_path / "run", tmp_path / "latest.pth"))


# --- savers that fail ------------------------------------------------------------------------------------------------


def to_local(folder, **options):
    return {"save": [{"name": "local", "root": str(folder), "latest": "latest", **options}]}


def test_a_failing_saver_does_not_stop_the_run_and_is_told_at_the_next_step_and_at_the_end(
    make_config, uninterrupted, results, command, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise EnvironmentProblem("nas: is not mounted.")

    with monkeypatch.context() as patch:
        patch.setattr(LocalCopies, "save", refuse)
        config = make_config(tmp_path / "run", track=to_local(tmp_path / "models"))
        (tmp_path / "config.json").write_text(json.dumps(config))
        outcome = command("train", tmp_path / "config.json")
    assert outcome.code == 4
    assert "saving step 12 to local failed: nas: is not mounted." in outcome.err
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "saving step 3 to local failed: nas: is not mounted." in told[1]["event"]
    assert "finished" in [line["event"] for line in told]
    assert results(tmp_path / "run") == results(uninterrupted)
    # Started again, it sends what has not arrived.
    assert command("train", tmp_path / "config.json").code == 0
    assert storage.verify(tmp_path / "models" / "latest").step == 12
    assert results(tmp_path / "run") == results(uninterrupted)


def test_a_signal_does_not_wait_for_a_slow_saver_and_the_next_start_sends(make_config, tmp_path, monkeypatch):
    gate, real = threading.Event(), LocalCopies.save

    def slow(self, *args, **kwargs):
        gate.wait(120)
        real(self, *args, **kwargs)

    monkeypatch.setattr(LocalCopies, "save", slow)
    monkeypatch.setattr("eclosion.training.start.GRACE_SECONDS", 0.1)
    config = make_config(tmp_path / "run", track=to_local(tmp_path / "models"))
    watcher = stop_when(tmp_path / "run" / "checkpoints" / "step-00000003", signal.SIGTERM)
    with pytest.raises(Interrupted, match="which is saved") as stopped:
        train(config)
    watcher.join()
    assert "are not where they should be yet. Start the run again" in " ".join(stopped.value.__notes__)
    gate.set()
    train(config)
    assert storage.verify(tmp_path / "models" / "latest").step == 12


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_leave_whole_copies_and_the_newest_in_the_end(make_config, results, tmp_path):
    sections = {"train": {"duration": "24 steps"}, "checkpoint": {"every": "1 steps"}, "sample": {"num_images": 0}}
    whole = train(make_config(tmp_path / "whole", **sections))
    models = tmp_path / "models"
    model = {"name": "local", "root": str(models), "latest": "model", "kind": "model"}
    config = make_config(tmp_path / "killed", track={"save": [*to_local(models)["save"], model]}, **sections)
    (tmp_path / "config.json").write_text(json.dumps(config))
    killer = Path(__file__).with_name("killer.py")
    command = [sys.executable, killer, tmp_path / "config.json", "8", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 8
    assert results(tmp_path / "killed") == results(whole)
    assert sorted(path.name for path in models.iterdir()) == ["latest", "model"]
    assert [storage.verify(models / name).step for name in ("latest", "model")] == [24, 24]
    assert not list(RunDir(tmp_path / "killed").outbox.iterdir())


def test_a_saver_that_cannot_work_is_told_before_anything_of_an_old_run_is_removed(
    saved, make_config, results, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(saved / "run", run)
    config = make_config(run, track=to_local(tmp_path, latest="run/checkpoints/mine"))
    with pytest.raises(ConfigError, match="where the run keeps its own"):
        train({**config, "overwrite": True})
    assert results(run) == results(saved / "run")


def test_an_overwritten_run_is_another_one_for_its_savers(saved, make_config, tmp_path, monkeypatch):
    """What the old run had saved at a step says nothing of the new one at the same step."""
    run, calls = tmp_path / "run", []
    config = make_config(run, track=to_local(tmp_path / "models"), train={"duration": "3 steps"})
    train(config)
    monkeypatch.setattr(LocalCopies, "save", lambda self, *args, **kwargs: calls.append(1) or 1 / 0)
    with pytest.raises(EnvironmentProblem, match="ZeroDivisionError"):
        train({**config, "overwrite": True})
    with pytest.raises(EnvironmentProblem, match="ZeroDivisionError"):
        train(config)  # finished, and not yet where it should be
    assert len(calls) == 2


def test_check_looks_at_places_on_this_machine(make_config, command, tmp_path):
    config = make_config(
        tmp_path / "run",
        track=to_local(tmp_path, latest="run/checkpoints/mine"),
        start={"name": "local", "path": str(tmp_path / "nothing")},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = command("check", tmp_path / "config.json")
    assert told.code != 0
    assert "where the run keeps its own" in told.out + told.err
    del config["track"]["save"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = command("check", tmp_path / "config.json")
    assert told.code != 0
    assert "nothing does not exist. Give the path of a checkpoint" in told.out + told.err


def test_the_best_checkpoint_is_saved_as_such(make_config, tmp_path):
    config = make_config(
        tmp_path / "run",
        track=to_local(tmp_path / "models", best="best-{step}"),
        validate={"every": "4 steps", "source": {"name": "butterflies", "size": 8, "resolution": 20}},
    )
    train(config)
    best = storage.read(next((tmp_path / "run" / "checkpoints").glob(LAST)), verified=True).state["validation"]["best"]
    assert storage.verify(tmp_path / "models" / f"best-{best['step']}").step == best["step"]


# --- by URL ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(folder):
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_goes_on_from_a_checkpoint_by_url_and_fetches_it_once(
    saved, make_config, uninterrupted, results, tmp_path
):
    with serving(saved) as (url, asked):
        config = make_config(tmp_path / "run", start={"name": "url", "url": f"{url}/each/06.pth/"})
        train(config)
        fetched = list(asked)
        train(config)
        assert asked == fetched
    assert results(tmp_path / "run")["hashes"] == results(uninterrupted)["hashes"]
    assert len([path for path in fetched if path.endswith("unet.safetensors")]) == 1
    assert not RunDir(tmp_path / "run").start.exists()  # it has checkpoints of its own now


def test_a_signal_ends_a_start_that_waits_for_a_server(make_config, tmp_path):
    over = threading.Event()

    class Stalling(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.send_header("ETag", '"one"')
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(bytes(1000))
            self.wfile.flush()
            over.wait(60)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    run = RunDir(tmp_path / "run")
    start = {"name": "url", "url": f"http://127.0.0.1:{server.server_port}/net.safetensors"}
    begun = time.monotonic()

    def signal_when_it_waits():
        while not list(run.start.glob("*/net.safetensors.partial")) and time.monotonic() < begun + 60:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=signal_when_it_waits)
    watcher.start()
    try:
        with pytest.raises(Interrupted, match="stopped before the first step") as stopped:
            train(make_config(run.root, start=start))
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        watcher.join()
    assert stopped.value.exit_code == 143
    assert not run.checkpoints.exists()


@pytest.mark.slow
def test_two_processes_on_one_url_fetch_it_once(saved, make_config, tmp_path):
    file = as_file(saved, tmp_path)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with serving(tmp_path) as (url, asked):
        section = {"name": "url", "url": f"{url}/net.safetensors", "sha256": sha256}
        config = make_config(tmp_path / "run", start=section, train={"duration": "2 steps"})
        code, output = two_processes(config, tmp_path)
    assert code == 0, output
    assert asked == ["/net.safetensors"]
    assert f"training from the weights in {url}/net.safetensors" in output


@pytest.mark.slow
def test_two_processes_save_once_and_fail_together(saved, make_config, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other").write_text("a letter")
    savers = [*to_local(tmp_path / "models")["save"], *to_local(tmp_path / "models", latest="other")["save"]]
    config = make_config(tmp_path / "run", track={"save": savers}, train={"duration": "3 steps"})
    code, output = two_processes(config, tmp_path)
    assert code != 0
    assert "other: is something else than a checkpoint of ours" in output
    assert "process 1 stops with process 0: saving step 3 to local failed" in output
    assert "lost another one" not in output
    assert storage.verify(tmp_path / "models" / "latest").step == 3
    assert "finished" in events(tmp_path / "run")
    (tmp_path / "models" / "other").unlink()
    code, output = two_processes(config, tmp_path)
    assert code == 0, output
    assert storage.verify(tmp_path / "models" / "other").step == 3


# --- made by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files, state, meta: meta.clear(), r"meta\.config: field required"),
        (lambda files, state, meta: meta.pop("fingerprint"), r"meta\.fingerprint: field required"),
        (lambda files, state, meta: meta.update(environment=3), r"meta\.environment: input should be a valid dict"),
        (lambda files, state, meta: state.clear(), r"state\.step: field required"),
        (lambda files, state, meta: state.update(step="six"), r"state\.step: input should be a valid integer"),
        (lambda files, state, meta: state.update(samples_seen=-5), r"state\.samples_seen: input should be greater"),
        (
            lambda files, state, meta: meta.update(kind="model", config="x"),
            r"meta\.config: input should be a valid dict",
        ),
        (
            lambda files, state, meta: files.update(other={"a": torch.ones(2)}),
            r"holds other, and this run has unet alone",
        ),
    ],
)
def test_a_checkpoint_that_no_run_wrote_is_refused_by_what_is_wrong_with_it(change, said, saved, make_config, tmp_path):
    whole = storage.read(max((saved / "run" / "checkpoints").iterdir()), verified=True)
    files, state, meta = dict(whole.files), dict(whole.state), dict(whole.manifest.meta)
    change(files, state, meta)
    storage.write(tmp_path / "made" / "step-00000012", files, state, meta)
    with pytest.raises(CheckpointError, match=said):
        train(starting(make_config, tmp_path / "run", tmp_path / "made" / "step-00000012"))
    assert not RunDir(tmp_path / "run").config.exists()
