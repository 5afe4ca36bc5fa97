"""One checkpoint on disk: the same bytes back, and no other."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eclosion.checkpoint import disk, storage
from eclosion.errors import CheckpointError
from eclosion.rundir import RunDir

DTYPES = sorted(storage._DTYPES, key=str)


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes seen as a tensor, so that every bit pattern may occur, NaN included."""
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert bits(tensor) == bits(theirs[name]), name


def small(step: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "unet": {"weight": torch.arange(6.0).reshape(2, 3) + step, "bias": torch.tensor(step)},
        "unet.ema": {"weight": torch.full((2, 3), 0.5, dtype=torch.bfloat16)},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small valid checkpoint, never changed."""
    folder = RunDir(tmp_path_factory.mktemp("run")).checkpoint(3)
    storage.write(folder, small(), {"step": 3, "samples_seen": 96}, {"config": "ab12", "world_size": 1})
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_type_and_shape_comes_back_bit_for_bit(dtype, tmp_path):
    tensors = {f"shape {shape}": some(dtype, shape) for shape in [(), (0,), (1,), (3, 0, 2), (2, 3, 5), (7,)]}
    folder = RunDir(tmp_path).checkpoint(1)
    storage.write(folder, {"net": tensors}, {}, {})
    assert_same(storage.read(folder, verified=True).files["net"], tensors)


def test_the_safetensors_library_reads_our_files(tmp_path):
    """An independent reader, which also checks offsets, overlaps and padding."""
    tensors = {f"{dtype}/{i}": some(dtype, shape) for dtype in DTYPES for i, shape in enumerate([(5,), (), (0, 2)])}
    folder = RunDir(tmp_path).checkpoint(1)
    storage.write(folder, {"net": tensors}, {}, {})
    assert_same(load_file(folder / "net.safetensors"), tensors)
    with safe_open(folder / "net.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_in_the_file(tmp_path):
    folder = RunDir(tmp_path).checkpoint(1)
    tensors = {"a": some(torch.bool, (3,)), "b": some(torch.float64, (2,)), "c": some(torch.bfloat16, (5,))}
    storage.write(folder, {"net": tensors}, {}, {})
    raw = (folder / "net.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_tensors_that_are_not_contiguous_or_need_gradients_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "expanded": torch.ones(1).expand(4),
    }
    folder = RunDir(tmp_path).checkpoint(1)
    storage.write(folder, {"net": tensors}, {}, {})
    for name, tensor in storage.read(folder, verified=True).files["net"].items():
        torch.testing.assert_close(tensor, tensors[name].detach(), rtol=0, atol=0)


def test_contiguous_cpu_tensors_are_written_from_where_they_are():
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    memory = storage._memory(tensor)
    tensor.fill_(1)
    assert bytes(memory) == bits(torch.ones(4, dtype=torch.bfloat16))


def test_a_chunk_boundary_inside_and_between_tensors_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK", 7)
    folder = RunDir(tmp_path).checkpoint(1)
    tensors = {"a": some(torch.uint8, (20,)), "b": some(torch.uint8, (7,)), "c": some(torch.float32, (9,))}
    storage.write(folder, {"net": tensors}, {}, {})
    assert_same(storage.read(folder, verified=True).files["net"], tensors)


def test_changing_a_loaded_tensor_does_not_change_the_file(copy):
    storage.read(copy, verified=True).files["unet"]["weight"].zero_()
    storage.verify(copy)


def test_state_and_meta_come_back(whole):
    loaded = storage.read(whole, verified=True)
    assert loaded.state == {"step": 3, "samples_seen": 96}
    assert loaded.manifest.meta == {"config": "ab12", "world_size": 1}
    assert loaded.manifest.step == 3
    assert loaded.manifest == storage.read_manifest(whole)


def test_the_manifest_states_what_sha256sum_would(whole):
    """A user without this software can check a checkpoint."""
    import hashlib

    body = json.loads((whole / "manifest.json").read_bytes())
    for name, entry in body["files"].items():
        raw = (whole / name).read_bytes()
        assert entry == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert set(body["files"]) == {path.name for path in whole.iterdir()} - {"manifest.json"}


def test_there_is_no_pickle_in_a_checkpoint(whole):
    assert {path.suffix for path in whole.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("bits_per_byte", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_bit_flipped_in_any_byte_is_detected(copy, bits_per_byte):
    """Exhaustive: every byte of every file, the manifest included; by default one bit of each, in the slow set all."""
    flips = 0
    for path in sorted(copy.iterdir()):
        raw = path.read_bytes()
        for flip in range(bits_per_byte * len(raw)):
            position = flip // bits_per_byte
            flipped = bytearray(raw)
            flipped[position] ^= 1 << (flip + position) % 8
            path.write_bytes(flipped)
            with pytest.raises(storage.DamagedError):
                storage.verify(copy)
            flips += 1
        path.write_bytes(raw)
    storage.verify(copy)  # the control: undamaged, it is valid
    assert flips == bits_per_byte * sum(path.stat().st_size for path in copy.iterdir()) > 900


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_other_damage_to_any_file_is_detected(whole, tmp_path_factory, data):
    """Cut short, grown, zeroed in part, swapped with another file, emptied or gone."""
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / whole.name))
    paths = sorted(folder.iterdir())
    path = data.draw(st.sampled_from(paths))
    raw = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "grow", "zero", "swap", "gone", "bytes"]))
    if kind == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    elif kind == "grow":
        path.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=9)))
    elif kind == "zero":
        start = data.draw(st.integers(0, len(raw) - 1))
        path.write_bytes(raw[:start] + b"\0" * (len(raw) - start))
    elif kind == "swap":
        path.write_bytes(data.draw(st.sampled_from([other for other in paths if other != path])).read_bytes())
    elif kind == "gone":
        path.unlink()
    else:
        start, new = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.binary(min_size=1, max_size=8))
        path.write_bytes((raw[:start] + new + raw[start + len(new) :])[: len(raw)])
    if kind in ("zero", "bytes") and path.read_bytes() == raw:
        storage.verify(folder)
        return
    with pytest.raises(storage.DamagedError) as caught:
        storage.verify(folder)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_damage_is_told_with_the_file_and_the_reason(copy):
    raw = bytearray((copy / "unet.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "unet.safetensors").write_bytes(raw)
    with pytest.raises(storage.DamagedError) as caught:
        storage.verify(copy)
    assert str(caught.value) == f"{copy}/unet.safetensors is damaged: its sha256 is not the one in manifest.json."


def test_a_manifest_under_another_step_s_name_is_refused(copy):
    with pytest.raises(storage.DamagedError, match=r"its manifest\.json is of step 3"):
        storage.verify(copy.rename(copy.with_name("step-00000009")))


def test_a_checkpoint_of_a_newer_format_is_no_damage(copy):
    """Falling back to an older checkpoint would hide that the wrong version runs."""
    manifest = storage.read_manifest(copy)
    newer = storage.Manifest(manifest.step, manifest.files, manifest.meta, format_version=2)
    (copy / "manifest.json").write_bytes(storage._manifest_bytes(newer))
    with pytest.raises(CheckpointError, match="format version 2, and this eclosion reads 1") as caught:
        storage.verify(copy)
    assert not isinstance(caught.value, storage.DamagedError)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"files": []},
        {"files": {"../../outside": {"size": 1, "sha256": "00"}, "state.json": {"size": 1, "sha256": "00"}}},
        {"files": {".hidden": {"size": 1, "sha256": "00"}, "state.json": {"size": 1, "sha256": "00"}}},
        {"files": {"state.json": {"size": "many", "sha256": "00"}}},
        {"files": {"state.json": 7}},
        {"files": {}},
        {"step": None},
    ],
)
def test_a_well_sealed_manifest_of_a_stranger_is_refused_in_one_line(copy, body):
    whole = {"format_version": 1, "step": 3, "files": {}, "meta": {}} | body
    (copy / "manifest.json").write_bytes(storage._sealed(storage._json(whole).removesuffix(b"\n}") + b",\n"))
    with pytest.raises(storage.DamagedError) as caught:
        storage.verify(copy)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=80), length=st.integers(0, 2**64 - 1) | st.integers(0, 100), body=st.booleans())
def test_a_malformed_tensor_file_gives_one_line(tmp_path_factory, raw, length, body):
    """Behind a manifest that fits, as a stranger could make it: hashes do not help, the reader has to."""
    path = tmp_path_factory.mktemp("x") / "unet.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + raw if body else raw)
    try:
        storage._read_safetensors(path)
    except storage.DamagedError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("raw", [b"", b"[", b"[1]", b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"null"])
def test_a_malformed_state_gives_one_line(tmp_path, raw):
    with pytest.raises(storage.DamagedError, match="is not a JSON object"):
        storage._parsed(raw, tmp_path / "state.json")


def test_a_pipe_in_place_of_a_file_does_not_hang_the_reader(copy):
    (copy / "state.json").unlink()
    os.mkfifo(copy / "state.json")
    with pytest.raises(storage.DamagedError, match="it is not a file"):
        storage.verify(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.ones(1)], ids=str)
def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path, value):
    folder = RunDir(tmp_path).checkpoint(1)
    with pytest.raises((ValueError, TypeError)):
        storage.write(folder, small(), {"loss": value}, {})
    assert not folder.parent.exists()


@pytest.mark.parametrize("tensors", [{"w": torch.zeros(1, dtype=torch.complex128)}, {"__metadata__": torch.zeros(1)}])
def test_what_safetensors_cannot_hold_is_refused_by_name(tmp_path, tensors):
    with pytest.raises(ValueError, match=f"{next(iter(tensors))}' of type .* cannot be stored"):
        storage.write(RunDir(tmp_path).checkpoint(1), {"net": tensors}, {}, {})


def test_a_state_too_large_to_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_JSON_LIMIT", 100)
    with pytest.raises(ValueError, match="too many"):
        storage.write(RunDir(tmp_path).checkpoint(1), small(), {"x": "y" * 100}, {})


def test_without_verification_a_file_that_is_gone_or_cut_is_still_found(copy):
    raw = (copy / "unet.safetensors").read_bytes()
    (copy / "unet.safetensors").write_bytes(raw[:-1])
    with pytest.raises(storage.DamagedError, match=f"it has {len(raw) - 1} bytes, and manifest.json states {len(raw)}"):
        storage.read(copy, verified=False)
    (copy / "unet.safetensors").unlink()
    with pytest.raises(storage.DamagedError, match=r"unet\.safetensors is missing"):
        storage.read(copy, verified=False)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101, "a b", "ä"])
def test_an_entry_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a checkpoint file"):
        storage.write(RunDir(tmp_path).checkpoint(1), {name: {}}, {}, {})


def test_a_full_disk_is_found_before_a_byte_is_written(tmp_path, monkeypatch):
    """One line with path, needed and free; nothing left behind."""
    real = os.statvfs(tmp_path)
    fields = list(real[:10])
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    folder = RunDir(tmp_path).checkpoint(1)
    with pytest.raises(CheckpointError) as caught:
        storage.write(folder, {"net": {"w": torch.zeros(500_000)}}, {}, {})
    assert str(caught.value) == (
        f"{folder} cannot be saved: No space left on device. It needs 2.0 MB, and 0.0 MB are free there. "
        "Older checkpoints are intact; make room or mend the disk, and start again."
    )
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_told_in_one_line(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", refuse)
    folder = RunDir(tmp_path).checkpoint(1)
    with pytest.raises(CheckpointError) as caught:
        storage.write(folder, small(), {}, {})
    text = str(caught.value)
    assert str(folder) in text
    assert os.strerror(code) in text
    assert "It needs" in text
    assert "are free there" in text
    assert "\n" not in text
    assert list(folder.parent.iterdir()) == []


def test_what_reads_back_as_something_else_is_never_published(tmp_path, monkeypatch):
    real = os.write

    def lie(fd, data):
        """A disk that loses the last byte of a write and says nothing."""
        real(fd, bytes(data[:-1]) + b"?")
        return len(data)

    monkeypatch.setattr(os, "write", lie)
    folder = RunDir(tmp_path).checkpoint(1)
    with pytest.raises(CheckpointError, match="reads back as something else"):
        storage.write(folder, small(), {}, {})
    assert list(folder.parent.iterdir()) == []


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    folder = RunDir(tmp_path).checkpoint(1)
    storage.write(folder, small(), {}, {})
    assert_same(storage.read(folder, verified=True).files["unet"], small()["unet"])


def test_the_same_step_with_the_same_content_keeps_what_is_there(copy):
    before = (copy / "manifest.json").stat().st_ino
    storage.write(copy, small(), {"step": 3, "samples_seen": 96}, {"config": "ab12", "world_size": 1})
    assert (copy / "manifest.json").stat().st_ino == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_same_step_with_other_content_or_damaged_is_replaced(copy, damaged):
    state = {"step": 3, "samples_seen": 96}
    if damaged:
        (copy / "state.json").write_bytes(b"{}")
    else:
        state["samples_seen"] = 97
    storage.write(copy, small(), state, {"config": "ab12", "world_size": 1})
    assert storage.read(copy, verified=True).state == state
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_folder_that_is_missing_rights_is_no_damage(copy, monkeypatch):
    """Passing over a good checkpoint because of a permission would throw work away."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
        storage.verify(copy)
    assert not isinstance(caught.value, storage.DamagedError)


def test_a_plain_safetensors_file_of_the_library_is_read_alike(tmp_path):
    tensors = {"w": torch.randn(3, 4), "b": torch.randn(3).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(storage._read_safetensors(tmp_path / "x.safetensors"), tensors)
