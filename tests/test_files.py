import json
import os
import resource
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from viewdiff_nb import files
from viewdiff_nb.files import (
    fingerprint,
    read_bytes,
    read_json,
    read_npy,
    read_safetensors,
    read_torch,
    shorten,
    write_atomically,
    write_safetensors,
    write_text,
)


class OwnError(ValueError):
    pass


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new folder/a.txt"
    write_text(path, "first 李雷")

    def fails(file):
        file.write(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert path.read_text(encoding="utf-8") == "first 李雷" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    program = (
        "import os, signal, sys; from viewdiff_nb.files import write_atomically\n"
        "def write(file): file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], write)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.txt")], check=False)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    left = [path.name for path in tmp_path.iterdir() if path.name != "a.txt"]
    assert len(left) == 1 and left[0].startswith("a.txt.") and left[0].endswith(files.PART)


def test_bytes_are_on_the_disk_before_they_have_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.fstat(number).st_size) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    write_atomically(tmp_path / "a", lambda file: file.write(bytes(1234)))
    assert calls == [1234, "replace"]


def test_a_full_disk_is_said(tmp_path):
    write_text(tmp_path / "a", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=r"cannot write .*/a: File too large; older files are whole"):
            write_text(tmp_path / "a", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "value", ["x" * 5000, ["x" * 5000] * 5000, {"a" * 5000: [[[["b"] * 9]]]}, 10**4000, b"y" * 5000]
)
def test_values_are_short_in_messages(value):
    assert len(shorten(value)) < 400
    assert shorten("short") == "'short'" and shorten([1, 2.5, None]) == "[1, 2.5, None]"


READERS = [read_bytes, read_json, read_npy, read_torch, read_safetensors]


@pytest.mark.parametrize("read", READERS)
def test_there_is_one_error_for_all_that_is_wrong(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing", OwnError)
    with pytest.raises(OwnError, match=str(tmp_path)):
        read(tmp_path, OwnError)  # a folder


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 5000, b'{"a": 1, "a": 2}']
)
def test_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(OwnError, match=r"a\.json: not valid JSON: .") as caught:
        read_json(tmp_path / "a.json", OwnError)
    assert len(str(caught.value)) < 400


def test_large_files_are_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OwnError, match="has 1099511627776 bytes"):
        read_json(tmp_path / "a.json", OwnError)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (4, 3), (2, 3, 4)])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, shape, kind, order):
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(np.random.default_rng(0).normal(size=shape).astype(kind), order=order))
    for mmap in (False, True):
        found, wanted = read_npy(path, OwnError, shape, mmap), np.load(path)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and np.array_equal(found, wanted)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_format_are_read(tmp_path, version):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(6.0).reshape(2, 3), version)
    assert read_npy(tmp_path / "a.npy", OwnError).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("read", [read_json, read_npy, read_torch, read_safetensors])
def test_changed_bytes_raise_no_other_error(tmp_path, read):
    """Of torch's files, whose checksums are compared, none is read as other numbers."""
    path, generator = tmp_path / "file", np.random.default_rng(0)
    weights = {"a.weight": torch.randn(3, 4), "b": torch.zeros(2, dtype=torch.float16)}
    if read is read_json:
        write_text(path, json.dumps({"poses": [[1.5, -2, 3]] * 4, "metadata": [{"person_name": "李雷"}]}))
    elif read is read_npy:
        np.save(path.with_suffix(".npy"), np.ones((4, 3), np.float32))
        path.with_suffix(".npy").rename(path)
    elif read is read_torch:
        write_atomically(path, lambda file: torch.save(weights, file))
    else:
        write_safetensors(path, weights, {"config": "{}"})
    whole, refused = path.read_bytes(), 0
    for _ in range(1000):
        content = bytearray(whole[: generator.integers(len(whole) // 2, len(whole) + 1)])
        for place in generator.integers(len(content), size=generator.integers(1, 4)):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            found = read(path, OwnError)
        except OwnError:
            refused += 1
        else:
            assert read is not read_torch or all(torch.equal(found[name], value) for name, value in weights.items())
    assert refused > 500


def test_a_fingerprint_is_of_all_bytes():
    """Such values stand in checkpoints and split files."""
    assert fingerprint(b"a", b"bc") == fingerprint(b"abc") == "ba7816bf8f01cfea"


def test_a_compressed_archive_is_refused_also_by_a_quick_look(tmp_path):
    torch.save({"weight": torch.ones(64)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "small.pth", "w", 8) as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"small\.pth .*does not compress"):
            read_torch(tmp_path / "small.pth", ValueError, mmap=mmap)
