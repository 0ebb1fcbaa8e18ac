"""Places: local folders and a real S3 server, by the same tests."""

import contextlib
import errno
import os
import time
from pathlib import Path

import pytest

from raysft.config import Source, parse
from raysft.data.sources.files import find_files
from raysft.data.sources.readers import parse_record, read_raw
from raysft.errors import RequestError, StorageFailed
from raysft.run.ownership import ensure_writable
from raysft.storage import filesystems, path
from raysft.storage.local_cache import cache_home, local_copy, model_copy
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for
from tests.objects import s3_server
from tests.servers import http, serving


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> StoragePath:
    """An empty folder."""
    if request.param == "local":
        return StoragePath.of(tmp_path / "runs")
    return StoragePath.of(request.getfixturevalue("server").uri(f"{tmp_path.name}/runs"))


@pytest.fixture
def remote(server, tmp_path) -> StoragePath:
    yield StoragePath.of(server.uri(f"{tmp_path.name}/runs"))
    server.heals()


def test_what_was_written_is_there_and_listed(place):
    assert not place.exists()
    assert place.entries() == place.walk() == {}
    (place / "a.json").write_text("é")
    (place / "deep/er/b.bin").write_bytes(b"12345")
    (place / "deep" / "odd name+%20#é").write_bytes(b"")
    assert (place / "a.json").read_text() == "é"
    assert (place / "deep").name == "deep"
    assert (place / "deep").parent == place
    assert {name: (entry.folder, entry.folder or entry.size) for name, entry in place.entries().items()} == {
        "a.json": (False, 2),
        "deep": (True, True),
    }
    assert {name: entry.size for name, entry in place.walk().items()} == {
        "a.json": 2,
        "deep/er/b.bin": 5,
        "deep/odd name+%20#é": 0,
    }
    assert (place / "deep/odd name+%20#é").exists()
    assert (place / "deep/er/b.bin").entry().size == 5


def test_what_is_not_there_is_said(place):
    for ask in (lambda it: it.read_bytes(), lambda it: it.entry()):
        with pytest.raises(FileNotFoundError):
            ask(place / "nothing")
    (place / "nothing").remove()


def test_files_and_folders_are_removed(place):
    (place / "a/b").write_text("x")
    (place / "a/c/d").write_text("x")
    (place / "e").write_text("x")
    (place / "a/b").remove()
    assert list(place.walk()) == ["a/c/d", "e"]
    (place / "a").remove()
    assert list(place.entries()) == ["e"]


def test_a_part_of_a_file_is_read(place):
    (place / "x").write_bytes(bytes(range(100)))

    def part(file):
        file.seek(40)
        return bytes(file.read(3))

    assert (place / "x").read(part) == bytes([40, 41, 42])


def test_a_write_that_breaks_off_leaves_nothing_new(place):
    (place / "x").write_text("before")

    def breaks(stream):
        stream.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        (place / "y").write(breaks)
    assert list(place.walk()) == ["x"]


def test_folders_go_up_and_come_down(place, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "weights", "sub/z"):
        (folder / name).write_text(name)
    written = []
    plain = StoragePath.write

    def noted(self, function):
        written.append(self.name)
        return plain(self, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoragePath, "write", noted)
        (place / "model").upload(folder, last="config.json")
    assert written[-1] == "config.json"
    (place / "model/sub/z").download(tmp_path / "back/z")
    assert (tmp_path / "back/z").read_text() == "sub/z"


def test_a_node_fetches_a_model_once_and_a_new_one_anew(remote, tmp_path, monkeypatch, server):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_copy("org/name") == "org/name"
    (remote / "model/config.json").write_text("{}")
    (remote / "model/sub/weights").write_text("1")
    copy = Path(local_copy((remote / "model").location))
    assert copy.name == "model"
    assert (copy / "sub/weights").read_text() == "1"
    asked = len(server.requests)
    assert local_copy((remote / "model").location) == str(copy)
    assert len(server.requests) == asked + 1, "a listing and nothing else"
    (remote / "model/sub/weights").write_text("22")
    assert (Path(local_copy((remote / "model").location)) / "sub/weights").read_text() == "22"
    os.utime(copy.parent, (0, 0))
    (remote / "one.gguf").write_text("file")
    assert Path(local_copy((remote / "one.gguf").location)).read_text() == "file"
    assert not copy.exists(), "nobody asked for it for a week"
    with pytest.raises(FileNotFoundError):
        local_copy((remote / "nothing").location)
    with pytest.raises(RequestError, match=f"^{remote}/nothing: there is no such file or folder; check the path$"):
        model_copy((remote / "nothing").location)


def test_a_storage_that_is_away_for_a_while_is_waited_for(remote, server):
    server.fails("PUT", seconds=5)  # longer than the attempts of the client itself
    said = []
    with retry_for(60, said.append):
        (remote / "x").write_text("there")
    assert (remote / "x").read_text() == "there"
    assert len(said) == 1
    assert said[0].startswith(f"{remote}/x: waiting for the storage, at most 60 s (")
    assert "region" not in said[0]


def test_a_server_that_never_answers_is_asked_again(remote, server, monkeypatch):
    filesystems._filesystem.cache_clear()
    monkeypatch.setattr(filesystems, "REQUEST_SECONDS", 1.0)
    server.fails("PUT", seconds=1.5, late=30)
    with retry_for(60, lambda line: None):
        begun = time.monotonic()
        (remote / "x").write_text("there")
    assert time.monotonic() - begun < 20
    filesystems._filesystem.cache_clear()


def test_waiting_has_an_end(remote, server):
    server.fails("HEAD", seconds=60)
    with (
        retry_for(1, lambda line: None),
        pytest.raises(StorageFailed, match="no answer from the storage for") as caught,
    ):
        (remote / "x").exists()
    assert "503" in str(caught.value)


@pytest.mark.parametrize(("status", "word"), [(403, "ACCESS_DENIED"), (400, "400")])
def test_what_waiting_does_not_mend_is_raised_at_once(remote, server, status, word):
    server.fails("PUT", seconds=60, status=status)
    begun = time.monotonic()
    with pytest.raises(StorageFailed, match=f"the storage refuses .*{word}"):
        (remote / "x").write_text("x")
    assert time.monotonic() - begun < 5


def test_what_is_wrong_with_a_uri_or_a_content_is_nothing_to_wait_for(remote):
    from pyarrow import ArrowInvalid

    from raysft.data.shards.manifest import is_complete
    from raysft.data.sources.pickle_guard import read_table

    with pytest.raises(ArrowInvalid, match="Unexpected query parameter"):
        StoragePath.of("s3://bucket/x?no_such_option=1").exists()
    (remote / "manifest.parquet").write_bytes(b"PAR1 and no more PAR1")
    assert not is_complete(remote / "manifest.parquet")
    with pytest.raises((ArrowInvalid, OSError)):
        read_table(remote / "manifest.parquet")


def test_a_bucket_that_is_not_there(server):
    with pytest.raises(StorageFailed, match="NO_SUCH_BUCKET"):
        StoragePath.of(server.uri("x").replace(server.bucket, "nobucket")).write_text("x")


def test_a_server_sees_nothing_of_another_that_the_same_process_has(server):
    StoragePath.of(server.uri("data/a.jsonl")).write_text("x")
    with s3_server() as other:
        assert not StoragePath.of(other.uri("")).walk()
    assert StoragePath.of(server.uri("data")).walk().keys() == {"a.jsonl"}


def test_a_full_disk_is_not_taken_for_a_storage_that_fails(remote, tmp_path, monkeypatch):
    (remote / "x").write_text("x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(path.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        (remote / "x").download(tmp_path / "down" / "x")
    assert not list((tmp_path / "down").iterdir())


def test_a_filesystem_that_shows_half_files_gets_drafts(tmp_path, monkeypatch):
    from pyarrow import fs

    monkeypatch.setattr(filesystems, "_filesystem", lambda root: (fs.LocalFileSystem(), str(tmp_path)))
    place = StoragePath.of("hdfs://host/runs")
    (place / "x").write_text("old")
    (place / "x").write_text("new")
    assert (tmp_path / "runs" / "x").read_text() == "new"
    assert list(place.walk()) == ["x"]


def test_people_see_no_secrets():
    place = StoragePath.of("s3://key:secret@bucket/a%20b/?endpoint_override=http://x&region=y") / "c"
    assert str(place) == "s3://bucket/a b/c"
    assert place.parent == StoragePath.of("s3://key:secret@bucket/a%20b?endpoint_override=http://x&region=y")
    assert StoragePath.of("file:///tmp/a%20b") == StoragePath("/tmp/a b")


@pytest.mark.parametrize(
    "answer", [lambda connection: None, http("500 Internal Server Error")], ids=["hangs up", "fails"]
)
def test_a_storage_that_never_answered_is_waited_for_less_than_one_of_a_run(tmp_path, monkeypatch, answer):
    from raysft.storage import sync

    monkeypatch.setattr("raysft.run.ownership.FIRST_SECONDS", 1.0)
    monkeypatch.setattr("raysft.storage.sync.FIRST_SECONDS", 1.0)
    monkeypatch.setattr("raysft.data.sources.files.FIRST_SECONDS", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with serving(answer) as port:
        path = f"s3://bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
        data = {"train": [{"name": "a", "path": "a.jsonl"}]}
        config = parse({"run": {"storage": path}, "model": {"path": "m"}, "data": data})
        begun = time.monotonic()
        with pytest.raises(
            RequestError, match=r"^run.storage: s3://\S+: no answer from the storage for .*credentials$"
        ):
            ensure_writable(config)
        with pytest.raises(RequestError, match=r"^source 'a': s3://\S+: no answer from the storage for .*credentials$"):
            find_files(Source(name="a", path=path))
        with (
            pytest.raises(StorageFailed, match="no answer from the storage for "),
            sync.open_read_only(config.run_place, print),
        ):
            pass
        assert time.monotonic() - begun < 30


def test_data_in_a_storage_that_is_away_for_a_while_is_found(remote, server):
    (remote / "a.jsonl").write_text('{"text": "a"}\n')
    server.fails("HEAD", seconds=5)  # longer than the attempts of the client itself
    (file,) = find_files(Source(name="s", path=(remote / "a.jsonl").location))
    assert server.refused
    assert [parse_record(raw) for _, _, raw in read_raw(file)] == [{"text": "a"}]


PAGE = b"<html>Please log in</html>"
NONSENSE = {
    "a.parquet": http("200 OK", PAGE),
    "a.arrow": http("200 OK", PAGE),
    "a.jsonl.gz": http("200 OK", PAGE),
    "a.jsonl": http("200 OK", b'{"text": "a"}\n', length=1000),
    "a.csv": http("200 OK", b"text\n", length=1000),
}


@pytest.fixture
def served(monkeypatch):
    """Gives the URI at a server that answers all alike."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with contextlib.ExitStack() as servers:
        yield (
            lambda answer, path: (
                f"s3://bucket/{path}?region=us-east-1&scheme=http"
                f"&endpoint_override=127.0.0.1:{servers.enter_context(serving(answer))}"
            )
        )


@pytest.mark.parametrize("name", NONSENSE)
def test_data_that_is_cut_off_or_a_page_is_one_line(served, name):
    (file,) = find_files(Source(name="s", path=served(NONSENSE[name], name)))
    remedy = "check the storage, or write the file again"
    with pytest.raises(RequestError, match=rf"^s3://bucket/{name}: cannot be read \(.+\); {remedy}$"):
        list(read_raw(file))


def test_a_server_that_says_yes_to_everything_is_no_storage(served):
    path = served(http("200 OK", PAGE), "runs")
    config = parse({"run": {"storage": path}, "model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    with pytest.raises(
        RequestError, match=r"^run.storage: s3://bucket/runs: .* the server is not an object store; check the path"
    ):
        ensure_writable(config)


def test_a_user_without_a_home_folder_is_asked_for_one(monkeypatch):
    """As in a container that runs under a number that no user has."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 123456)
    with pytest.raises(RequestError, match="user 123456 has no home directory, and HOME is not set; set it"):
        cache_home()
