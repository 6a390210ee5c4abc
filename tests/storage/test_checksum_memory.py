"""Checksums that are remembered: a file is read once while it stays as it is, by this process and by the next."""

import os

import pytest

from mlcm_rl.storage import hashing
from mlcm_rl.storage.hashing import is_unchanged, sha256_once


@pytest.fixture
def read(monkeypatch, tmp_path) -> list[str]:
    """The names of the files that are read, in order; files count as large and as written long ago."""
    monkeypatch.setenv("MLCM_RL_CHECKSUMS", str(tmp_path / "memory"))
    monkeypatch.setattr(hashing, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(hashing, "LARGE", 0)
    hashing._memory.cache_clear()
    names: list[str] = []
    sha256 = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def next_process() -> None:
    hashing._memory.cache_clear()


def test_a_file_is_read_again_when_it_was_written_to_whatever_its_time_of_modification(tmp_path, read):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256_once(path)
    next_process()
    assert sha256_once(path) == first
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_once(path) != first
    next_process()
    assert sha256_once(path) == hashing.sha256(path)
    assert read == ["x", "x", "x"]  # the last by this test itself


def test_a_file_that_changed_just_now_is_remembered_by_no_other_process(tmp_path, read, monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED_NS", 10**15)
    (tmp_path / "x").write_bytes(b"one")
    for _ in range(2):
        sha256_once(tmp_path / "x")
    assert read == ["x"]
    next_process()
    sha256_once(tmp_path / "x")
    assert read == ["x", "x"]


def test_a_small_file_is_not_worth_a_line(tmp_path, read, monkeypatch):
    monkeypatch.setattr(hashing, "LARGE", 10)
    (tmp_path / "x").write_bytes(b"one")
    sha256_once(tmp_path / "x")
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("line", ["", "[", "[1, 2, 3, 4, 5]", '["x", 1, 2, 3]', '["x", "1", 2, 3, "s"]', "\x00\ufffd"])
def test_a_damaged_memory_costs_a_reading_alone(tmp_path, read, line):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256_once(path)
    memory = next((tmp_path / "memory").iterdir())
    memory.write_text(line, encoding="utf-8")
    next_process()
    assert sha256_once(path) == first
    assert read == ["x", "x"]


def test_without_a_place_to_write_checksums_are_computed_all_the_same(tmp_path, read, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLCM_RL_CHECKSUMS", str(tmp_path / "file" / "below"))
    (tmp_path / "x").write_bytes(b"one")
    assert sha256_once(tmp_path / "x") == hashing.sha256(tmp_path / "x")


def test_without_a_home_folder_they_are_remembered_in_the_working_folder(tmp_path, read, monkeypatch):
    monkeypatch.delenv("MLCM_RL_CHECKSUMS")
    monkeypatch.delenv("MLCM_RL_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(b"one")
    assert sha256_once(tmp_path / "x") == hashing.sha256(tmp_path / "x")
    assert [path.suffix for path in (tmp_path / ".mlcm_rl_cache" / "checksums").iterdir()] == [".jsonl"]


def test_a_line_with_another_checksum_is_not_believed(tmp_path, read):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256_once(path)
    memory = next((tmp_path / "memory").iterdir())
    memory.write_text(memory.read_text(encoding="utf-8").replace(first[:8], "0" * 8), encoding="utf-8")
    next_process()
    assert sha256_once(path) == first


def test_what_is_remembered_calls_no_file_damaged(tmp_path, read, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    right = sha256_once(path)
    hashing._memory(tmp_path)["x"][-1] = "0" * 64
    assert sha256_once(path) == "0" * 64
    assert is_unchanged(path, right)
    assert not is_unchanged(path, "1" * 64)
