import errno
import os
import stat

import pytest

from mupx import files
from mupx.errors import StorageError
from mupx.files import append, read_json, replacing, sweep, write_atomically


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_its_name_changes_and_the_folder_after(tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    write_atomically(path, b"old")
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_atomically(path, b"new")
    assert calls == [b"old", "rename", "folder"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "file" / "deeper" / "recipe.toml", b"")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"disk /.*, [\d,.]+ MiB free\); free space"):
        write_atomically(tmp_path / "file", b"new")


def test_an_interruption_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_append_that_fails_takes_back_what_it_wrote(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append(path, b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            append(path, b"two\n")
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path):
    for name in (".file.123-0123abcd.tmp", ".file.tmp", "file.123-0123abcd.tmp", ".file.123"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".file.123",
        ".file.tmp",
        "file.123-0123abcd.tmp",
    ]
    sweep(tmp_path / "nowhere")


def test_the_name_of_a_killed_writer_s_file_is_one_that_is_swept(tmp_path):
    with replacing(tmp_path / "file") as temporary:
        assert files.TEMPORARY.fullmatch(temporary.name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[" * 100_000, "nested too deeply"), ("[1]", "holds list"), ("{", "property name"), (b"\xff", "codec")],
)
def test_what_is_no_json_object_is_a_value_error(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason):
        read_json(path)


def test_a_file_larger_than_any_of_ours_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(files.MOST_TEXT + 1)  # a hole: it takes no space
    with pytest.raises(ValueError, match="more than"):
        read_json(path)
