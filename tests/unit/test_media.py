"""Where the images of records are: in files, in records, on hosts; each is opened once, or its record is rejected."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from raysft.config import Source
from raysft.config.conflicts import refuse_conflicts
from raysft.data.prepare import prepare
from raysft.data.shards import media_files, ray_pipeline
from raysft.data.shards.build import build_shards
from raysft.data.shards.manifest import load_manifest
from raysft.data.shards.parts import kept_parts
from raysft.data.shards.shard_set import resolve_shard_set
from raysft.data.sources import downloads
from raysft.data.sources.content import content_digest
from raysft.data.sources.formats import to_examples
from raysft.data.sources.media import MediaOpener, MediaOptions
from raysft.data.sources.pickle_guard import read_table
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import Example, Medium, Rejected
from raysft.errors import NotNow, RequestError
from raysft.media import files, images
from raysft.storage import hub
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for
from tests.objects import s3_server
from tests.servers import serving
from tests.shards import data_config, write_records, written
from tests.tiny_vision import tiny_vision_model


def picture(shade: int = 0, size: tuple[int, int] = (20, 12), form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(stream, form)
    return stream.getvalue()


def example(*values, answer: str = "a", **options) -> Example:
    parts = [{"type": "image", "image": value} for value in values]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
    ((item, _),) = to_examples([("data/a.jsonl:1", record)], Source(name="s", **options))
    assert isinstance(item, Example), item
    return item


@pytest.fixture
def options(tmp_path) -> MediaOptions:
    return MediaOptions(folder="", cache=str(tmp_path / "cache" / "media"), hosts=(), max_pixels=None, min_pixels=None)


def opened(item: Example, options: MediaOptions, folder: Path) -> Example | Rejected:
    (found,) = MediaOpener(options, {"data/a.jsonl": str(folder / "a.jsonl")})([item])
    return found


def media(item: Example, options: MediaOptions, folder: Path) -> list[Medium]:
    found = opened(item, options, folder)
    assert isinstance(found, Example), found
    return [medium for message in found.messages for medium in message.media]


def reason(item: Example, options: MediaOptions, folder: Path) -> str:
    found = opened(item, options, folder)
    assert isinstance(found, Rejected), found
    assert (found.source, found.record) == ("s", "data/a.jsonl:1")
    assert "\n" not in found.reason
    return found.reason


def test_a_relative_path_begins_where_the_data_file_lies(tmp_path, options):
    (tmp_path / "sub").mkdir()
    place = tmp_path / "sub" / "ä b.png"
    place.write_bytes(picture())
    expected = Medium("image", str(place), digest=files.digest(picture()), width=20, height=12, size=len(picture()))
    for name in ("sub/ä b.png", str(place), f"file://{tmp_path}/sub/%C3%A4%20b.png"):
        assert media(example(name), options, tmp_path) == [expected]
        assert files.read(expected.location, expected.digest) == picture()
    elsewhere = replace(options, folder=str(tmp_path / "sub"))
    assert media(example("ä b.png"), elsewhere, tmp_path / "none") == [expected]
    assert not Path(options.cache).exists()


def test_bytes_of_records_become_files_of_the_cache_by_their_hash(tmp_path, options):
    url = "data:image/png;base64," + b64encode(picture()).decode()
    name = files.digest(picture())
    found = media(example({"bytes": picture(), "path": "x.png"}, url), options, tmp_path)
    place = Path(options.cache) / name[:2] / name
    assert found == [Medium("image", str(place), digest=name, width=20, height=12, size=len(picture()))] * 2
    assert place.read_bytes() == picture()
    assert [path for path in Path(options.cache).rglob("*") if path.is_file()] == [place]


def test_many_may_write_the_same_image_at_once(tmp_path, options):
    items = [example({"bytes": picture(shade % 3)}) for shade in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: media(item, options, tmp_path)[0], items))
    assert {medium.location for medium in found} == {
        str(path) for path in Path(options.cache).rglob("*") if path.is_file()
    }
    for medium, shade in zip(found, range(60), strict=True):
        assert files.read(medium.location, medium.digest) == picture(shade % 3)


def test_an_image_that_is_in_many_records_is_opened_once(tmp_path, options, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())
    seen = list[bytes]()
    monkeypatch.setattr(
        images, "open_image", lambda content, own=images.open_image: (seen.append(content), own(content))[1]
    )
    opener = MediaOpener(options, {"data/a.jsonl": str(tmp_path / "a.jsonl")})
    for _ in range(3):
        assert all(isinstance(item, Example) for item in opener([example("a.png")]))
    assert seen == [picture()]


def test_animations_are_counted(tmp_path, options):
    frames = [Image.new("RGB", (4, 4), shade) for shade in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.png").write_bytes(picture())
    opener = MediaOpener(options, {"data/a.jsonl": str(tmp_path / "a.jsonl")})
    assert len(list(opener([example("a.gif", "a.png"), example("a.gif")]))) == 2
    assert opener.counts == {"animated": 2}


def test_a_file_that_changes_or_goes_after_it_was_opened_is_named(tmp_path, options):
    place = tmp_path / "a.png"
    place.write_bytes(picture())
    (medium,) = media(example("a.png"), options, tmp_path)
    place.write_bytes(picture(1))
    with pytest.raises(
        files.Unreadable, match=r"a\.png: has changed since it was tokenized; restore it, or set another"
    ):
        files.read(medium.location, medium.digest)
    place.unlink()
    with pytest.raises(files.Unreadable, match=r"a\.png: cannot be read \(No such file or directory\); restore it, or"):
        files.read(medium.location, medium.digest)


def test_limits_decide_the_size(tmp_path, options):
    (tmp_path / "a.png").write_bytes(picture(size=(400, 300)))
    (found,) = media(example("a.png"), replace(options, max_pixels=1200), tmp_path)
    assert (found.width, found.height) == (40, 30)
    (found,) = media(example("a.png"), replace(options, min_pixels=480_000), tmp_path)
    assert (found.width, found.height) == (800, 600)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", "none.png: does not exist; correct the path, or set data.media_dir"),
        ("none.png\n", r"none.png\n: does not exist"),
        ("x\u2028\x1b.png", r"x\u2028\x1b.png: does not exist"),
        ("sub", "sub: is a folder"),
        ("/dev/zero", "/dev/zero: is a device"),
        ("pipe", "pipe: is a device or a pipe"),
        ("/proc/self/mem", "/proc/self/mem: is empty"),
        ("huge.png", "huge.png: has more than 1,024 MiB"),
        ("text.png", "text.png: is not an image"),
        ("empty.png", "empty.png: is empty"),
        ("x" * 300, "cannot be read"),
        ("ftp://x.org/a.png", "ftp:// is not supported"),
        ("ftp://x.org/a\n.png", "ftp:// is not supported"),
        ("https://x.org/a\n.png", "is not among data.media_hosts"),
        ("http://x.org/a.png", "x.org is not among data.media_hosts"),
        ("https://x.org:99/a.png", "x.org:99 is not among data.media_hosts"),
        ("https:///a.png", "is not an http or https URL"),
        ("https://[/a.png", "is not a valid URL"),
        ("s3://b/a.png?endpoint_override=10.0.0.1", "data.media_dir"),
        ("s3://key:hidden@b/a.png", "data.media_dir"),
        ({"bytes": b"hello"}, "image of 5 bytes in the record: is not an image"),
    ],
)
def test_what_cannot_be_opened_is_rejected_with_file_and_reason(tmp_path, options, name, words):
    (tmp_path / "sub").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate((1 << 30) + 1)  # takes no room
    found = reason(example(name), options, tmp_path)
    assert words in found
    assert "hidden" not in found
    assert "override" not in found


def test_a_hub_that_does_not_answer_stops_the_run_though_its_files_seem_to_be_missing(tmp_path, options, monkeypatch):
    def missing(path):
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(StoragePath, "read_bytes", missing)
    item, silent = example("hf://datasets/a/b/x.png"), hub.bound_requests()
    for server in [*silent]:  # those of other tests
        monkeypatch.delitem(silent, server)
    assert "x.png: does not exist" in reason(item, options, tmp_path)
    monkeypatch.setitem(silent, "https://hub.test", time.monotonic())
    with pytest.raises(NotNow, match=r"x\.png: https://hub\.test does not respond; try again"):
        opened(item, options, tmp_path)
    monkeypatch.setitem(silent, "https://hub.test", time.monotonic() - hub.AWAY_SECONDS)
    assert "x.png: does not exist" in reason(item, options, tmp_path)


def test_one_bad_image_rejects_its_record_and_no_other(tmp_path, options):
    (tmp_path / "a.png").write_bytes(picture())
    opener = MediaOpener(options, {"data/a.jsonl": str(tmp_path / "a.jsonl")})
    found = list(opener([example("a.png"), example("a.png", "none.png"), example("a.png")]))
    assert [type(item) for item in found] == [Example, Rejected, Example]


def test_text_alone_is_left_as_it_is(options):
    item = Example("s", "a:1", text="x")
    (found,) = MediaOpener(options, {})([item])
    assert found is item


def test_the_same_image_is_the_same_example_under_any_name(tmp_path, options):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "c.png").write_bytes(picture(9))

    def digest_of(*names) -> bytes:
        found = opened(example(*names), options, tmp_path)
        assert isinstance(found, Example)
        return content_digest(found)

    assert digest_of("a.png") == digest_of("b.png") == digest_of({"bytes": picture()})
    assert digest_of("a.png") != digest_of("c.png")
    assert digest_of("a.png", "c.png") != digest_of("c.png", "a.png")
    assert digest_of("a.png") != digest_of("a.png", "a.png")


@contextmanager
def web(*answers: bytes):
    """A server that gives one answer after the other, and the last one again; yields its name and the paths it was asked for."""
    asked = list[str]()
    lock = threading.Lock()

    def answer(connection: socket.socket) -> None:
        request = connection.recv(65536).decode()
        with lock:
            asked.append(request.split()[1])
            content = answers[min(len(asked), len(answers)) - 1]
        connection.sendall(content)

    with serving(answer) as port:
        yield f"localhost:{port}", asked


def http(content: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(content) if length is None else length}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSES", (0.0, 0.0))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_an_allowed_host_is_asked_once_for_each_image(tmp_path, options):
    with web(http(picture())) as (host, asked):
        allowed = replace(options, hosts=(host,))
        opener = MediaOpener(allowed, {})
        for _ in range(2):
            (found,) = opener([example(f"http://{host}/a.png?x=1")])
            assert isinstance(found, Example)
        (medium,) = found.messages[0].media
        assert asked == ["/a.png?x=1"]
    assert medium.location.startswith(options.cache)
    assert files.read(medium.location, medium.digest) == picture()


def test_redirects_do_not_leave_the_allowed_hosts(tmp_path, options):
    with web(http(picture())) as (secret, asked_secret):
        for target in (f"http://{secret}/x", "file:///etc/passwd", "ftp://x.org/a"):
            with web(http(b"", "302 Found", f"Location: {target}")) as (host, _):
                found = reason(example(f"http://{host}/a.png"), replace(options, hosts=(host,)), tmp_path)
                assert any(
                    words in found
                    for words in ("not among data.media_hosts", "is not an http or https URL", "status 302")
                )
        assert asked_secret == []
        with web(http(b"", "302 Found", f"Location: http://{secret}/x")) as (host, _):
            assert media(example(f"http://{host}/a.png"), replace(options, hosts=(host, secret)), tmp_path)
        with web(http(b"", "302 Found", "Location: /again")) as (host, asked):
            assert "302" in reason(example(f"http://{host}/a"), replace(options, hosts=(host,)), tmp_path)
            assert len(asked) < 15


def test_a_host_that_stumbles_is_asked_again(tmp_path, options):
    broken = http(picture(), length=1_000_000)
    with web(http(b"", "503 Busy"), broken, http(picture())) as (host, asked):
        assert media(example(f"http://{host}/a.png"), replace(options, hosts=(host,)), tmp_path)
        assert len(asked) == 3


def test_a_host_that_is_down_stops_the_run_as_records_would_be_missing_for_good(tmp_path, options):
    with web(http(b"", "503 Busy")) as (host, _), pytest.raises(RequestError, match="does not respond"):
        opened(example(f"http://{host}/a.png"), replace(options, hosts=(host,)), tmp_path)
    with socket.create_server(("localhost", 0)) as listening:
        host = f"localhost:{listening.getsockname()[1]}"
    with pytest.raises(RequestError, match="does not respond"):
        opened(example(f"http://{host}/a.png"), replace(options, hosts=(host,)), tmp_path)


def test_what_is_not_there_or_no_image_or_too_large_is_rejected(tmp_path, options, monkeypatch):
    for answer, words in ((http(b"", "404 Not Found"), "404"), (http(b"<html>"), "a web page")):
        with web(answer) as (host, asked):
            found = reason(example(f"http://{host}/a.png"), replace(options, hosts=(host,)), tmp_path)
            assert words in found
            assert f"{host}/a.png" in found
            assert len(asked) == 1
    monkeypatch.setattr(downloads, "MAX_BYTES", 1 << 20)
    with web(http(bytes(2 << 20))) as (host, _):
        assert "more than 1 MiB" in reason(example(f"http://{host}/a"), replace(options, hosts=(host,)), tmp_path)


def test_a_host_that_sends_a_byte_at_a_time_is_left(tmp_path, options, monkeypatch):
    monkeypatch.setattr(downloads, "TOTAL_SECONDS", 0.3)

    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        for byte in http(picture()):
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    started = time.monotonic()
    with serving(drip) as port, pytest.raises(RequestError, match="no complete response"):
        opened(example(f"http://localhost:{port}/a"), replace(options, hosts=(f"localhost:{port}",)), tmp_path)
    assert time.monotonic() - started < 10


def shard_set(folder: Path, model: Path, **data):
    config = data_config(folder, **data)
    return resolve_shard_set(config, config.data.train[0], "all", str(model), with_prompts=False)


def test_images_begin_in_the_folder_of_the_registry_whose_files_they_are_of(tmp_path, model):
    (tmp_path / "sub").mkdir()
    write_records(tmp_path / "sub" / "a.jsonl", [{"turns": ["q", "a"]}])
    (tmp_path / "dataset_info.json").write_text('{"x": {"file_name": "sub/a.jsonl", "formatting": "sharegpt"}}')
    registered = {"train": [{"name": "x"}], "registry": str(tmp_path)}
    assert shard_set(tmp_path, model, **registered).media.folder == str(tmp_path)
    assert shard_set(tmp_path, model, **registered, media_dir=f"{tmp_path}/b").media.folder == f"{tmp_path}/b"
    by_path = {"train": [{"name": "x", "path": f"{tmp_path}/sub/a.jsonl"}], "registry": str(tmp_path)}
    assert shard_set(tmp_path, model, **by_path).media.folder == ""
    assert shard_set(tmp_path, model, **by_path, media_dir="s3://b/c").media.folder == "s3://b/c"


def test_shards_of_a_model_for_images_are_known_by_their_places_and_sizes_and_those_of_text_are_not(tmp_path, model):
    sighted = tmp_path / "sighted"
    shutil.copytree(model, sighted)
    (sighted / "preprocessor_config.json").write_text("{}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "a.jsonl", [{"turns": ["q", "a"]}])

    def keys(of: Path) -> list[str]:
        sources = [{"train": [{"name": "a", "path": f"{tmp_path}/{name}/a.jsonl"}]} for name in ("one", "two")]
        changes = [{"image_max_pixels": 99}, {"image_min_pixels": 9}, {"media_dir": "x"}, {"media_hosts": ["x.org"]}]
        found = [shard_set(tmp_path, of, **source) for source in sources]
        found += [shard_set(tmp_path, of, **sources[0], **change) for change in changes]
        return [each.directory.name for each in found]

    assert len(set(keys(sighted))) == 6
    assert len(set(keys(model))) == 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("media_hosts", ["https://x.org"], "is not a valid host name"),
        ("media_dir", "ftp://x/y", "ftp:// is not supported"),
        ("image_min_pixels", 2_000, "greater than image_max_pixels=1000"),
        ("image_max_pixels", 0, "greater than 0"),
    ],
)
def test_keys_that_cannot_be_are_refused(tmp_path, key, value, words):
    with pytest.raises(RequestError, match=words):
        data_config(tmp_path, **{"image_max_pixels": 1000, key: value})


def test_raw_text_has_no_images(tmp_path):
    with pytest.raises(RequestError, match="image_max_pixels=1000 is for conversations"):
        refuse_conflicts(data_config(tmp_path, stage="pt", image_max_pixels=1000))


def test_images_lie_beside_their_records_in_an_object_store(tmp_path, sighted):
    """Both in a folder that is the source; the cache is in the store, too, for what is in the records."""
    record = {**asked("x/a b.png")}
    embedded = asked("data:image/png;base64," + b64encode(picture(3)).decode())
    with s3_server() as server:
        StoragePath.of(server.uri("data/x/a b.png")).write_bytes(picture(1))
        StoragePath.of(server.uri("data/a.jsonl")).write_text(json.dumps(record) + "\n" + json.dumps(embedded) + "\n")
        source, cache = {"name": "a", "path": server.uri("data")}, server.uri("cache")
        manifest = written(shard_set(tmp_path, sighted, train=[source], cache=cache), str(sighted))
        places = [row["media"][0] for row in read_table(manifest.shard_paths()[0]).to_pylist()]
        assert [files.read(place["location"], place["digest"]) for place in places] == [picture(1), picture(3)]
        assert str(StoragePath(places[0]["location"])) == f"s3://{server.bucket}/data/x/a b.png"
        assert str(StoragePath(places[1]["location"])).startswith(f"s3://{server.bucket}/cache/media/")
        other = shard_set(tmp_path, sighted, train=[source], media_dir=server.uri("none"), cache=cache)
        (rejected,) = written(other, str(sighted)).rejected
        assert rejected.reason.startswith(f"s3://{server.bucket}/none/x/a b.png: does not exist")
        server.fails("a.*b[.]png", 60, status=503)
        silent = shard_set(tmp_path, sighted, train=[source], cache=server.uri("silent"))
        with retry_for(0), pytest.raises(NotNow, match="no answer from the storage"):
            written(silent, str(sighted))
        server.heals()
        server.fails("a.*b[.]png", 60, status=403)
        again = shard_set(tmp_path, sighted, train=[source], cache=server.uri("other"))
        with pytest.raises(RequestError, match=r"a\.jsonl:1: .*check the storage and its credentials"):
            written(again, str(sighted))


@pytest.fixture(scope="module")
def sighted(tmp_path_factory) -> Path:
    return tiny_vision_model(tmp_path_factory.mktemp("sighted"), "qwen2.5-vl")


def asked(picture_of, *more) -> dict:
    parts = [{"type": "image", "image": picture_of}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}, *more]}


def test_images_go_from_records_to_shards(tmp_path, sighted):
    """Each in a file that is there, with a size within the limits."""
    (tmp_path / "big.png").write_bytes(picture(1, (280, 140)))
    (tmp_path / "broken.png").write_bytes(picture(2)[:50])
    url = "data:image/png;base64," + b64encode(picture(3, (56, 56))).decode()
    records = [
        asked("big.png"), asked("broken.png"), asked(url), asked("none.png"), {"turns": ["q", "a"]},
        {"turns": ["<image>q", "a"], "images": ["big.png"]},
    ]  # fmt: skip
    write_records(tmp_path / "a.jsonl", records)
    manifest = written(shard_set(tmp_path, sighted, image_max_pixels=140 * 70), str(sighted))
    (file,) = manifest.shard_paths()
    rows = read_table(file).to_pylist()
    assert [row["record"].rpartition(":")[2] for row in rows] == ["1", "3", "5", "6"]
    assert [[(medium["width"], medium["height"]) for medium in row["media"]] for row in rows] == [
        [(140, 70)], [(56, 56)], [], [(140, 70)],
    ]  # fmt: skip
    for row in rows:
        for medium in row["media"]:
            files.read(medium["location"], medium["digest"])
    assert rows[0]["media"][0]["location"] == str(tmp_path / "big.png")
    assert rows[1]["media"][0]["location"].startswith(str(tmp_path / "cache" / "media"))
    reasons = [item.reason for item in manifest.rejected]
    assert len(reasons) == 2
    assert "broken.png: is" in reasons[0]
    assert "none.png: does not exist" in reasons[1]


def test_records_whose_images_are_mended_are_tokenized_anew(tmp_path, sighted):
    """Into a folder of its own: a run that began with the old data can end with it."""
    (tmp_path / "broken.png").write_bytes(picture(2)[:50])
    write_records(tmp_path / "a.jsonl", [asked("broken.png"), asked("none.png"), {"turns": ["q", "a"]}])

    told = []

    def manifest():
        (found,) = build_shards([shard_set(tmp_path, sighted)], str(sighted), max_rejected=1, notify=told.append)
        return found

    old = manifest()
    assert [manifest().reused, manifest().key, len(old), len(old.rejected)] == [True, old.key, 1, 2]
    assert "tokenized again" not in "".join(told)
    (tmp_path / "none.png").write_bytes(picture(1))
    added = manifest()
    lines = [line for line in told if "tokenized again" in line]
    assert [line.split(" since")[0] for line in lines] == [f"source 'a': {tmp_path}/none.png was added or changed"]
    assert (added.reused, len(added), len(added.rejected)) == (False, 2, 1)
    (tmp_path / "broken.png").write_bytes(picture(2))
    corrected = manifest()
    assert (corrected.reused, len(corrected), corrected.rejected) == (False, 3, ())
    again = manifest()
    assert (again.reused, again.key) == (True, corrected.key)
    assert len({old.key, added.key, corrected.key}) == 3
    (tmp_path / "none.png").unlink()
    (tmp_path / "broken.png").write_bytes(picture(2)[:50])
    assert (manifest().reused, len(manifest().rejected)) == (True, 2)
    assert load_manifest(old.path).rejected == old.rejected


@pytest.mark.parametrize("state", ["as it was", "corrected"])
def test_a_copy_of_images_is_the_same_data(tmp_path, sighted, state):
    """Machines may copy all of them at each start, with times of its own, and still resume."""
    write_records(tmp_path / "a.jsonl", [asked(name) for name in ("broken.png", "empty.png", "folder", "a.png")])
    contents = {"broken.png": picture(2)[:50], "empty.png": b"", "a.png": picture(1)}

    def copied(time, **changed):
        for name, content in (contents | changed).items():
            (tmp_path / name).write_bytes(content)
            os.utime(tmp_path / name, ns=(time, time))
        os.utime(tmp_path / "folder", ns=(time, time))

    def manifest():
        (found,) = build_shards([shard_set(tmp_path, sighted)], str(sighted), max_rejected=1)
        return found.reused, found.key, len(found.rejected)

    (tmp_path / "folder").mkdir()
    copied(1_000)
    first = manifest()
    assert first[2] == 3
    if state == "corrected":
        contents["broken.png"] = picture(2)
        copied(2_000)
        first = manifest()
        assert first[::2] == (False, 2)
    copied(3_000)
    assert manifest() == (True, *first[1:])


def test_a_storage_that_does_not_answer_about_mended_images_is_told(tmp_path, sighted):
    write_records(tmp_path / "a.jsonl", [asked("none.png"), {"turns": ["q", "a"]}])
    with s3_server() as server:

        def resolved():
            return shard_set(tmp_path, sighted, media_dir=server.uri("x"))

        written(resolved(), str(sighted))
        assert resolved().manifest.exists()
        server.fails("none", 60)
        with (
            retry_for(0),
            pytest.raises(RequestError, match=r"^source 'a': s3://\S+/x/none\.png: no answer from the storage"),
        ):
            resolved()


def test_what_is_known_of_a_shard_is_not_kept_if_its_images_may_be_mended(tmp_path, sighted):
    """Else whoever corrects the images after an error would get the error again."""
    tokenizer = Tokenizer.load(str(sighted))
    for name, kept in (("none.png", 0), ("a.png", 1)):
        (tmp_path / "a.png").write_bytes(picture(1))
        write_records(tmp_path / "a.jsonl", [asked(name)])
        each = shard_set(tmp_path, sighted)
        records = next(ray_pipeline.record_batches(each.files))
        ray_pipeline._shards([each], records, tokenizer, {each.directory: frozenset()})
        assert len(kept_parts(each.directory)) == kept


def test_the_same_question_about_the_same_image_is_a_duplicate_and_about_another_is_none(tmp_path, sighted):
    for name, shade in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.png").write_bytes(picture(shade))
    write_records(tmp_path / "a.jsonl", [asked("a.png"), asked("b.png"), asked("c.png")])
    prepared = prepare(data_config(tmp_path), str(sighted))
    assert prepared.duplicates.train["a"]["repeated"] == 1


def test_many_questions_in_the_same_words_are_held_out_by_their_images(tmp_path, sighted):
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    write_records(tmp_path / "a.jsonl", [asked(f"{number}.png") for number in range(60)])
    prepared = prepare(data_config(tmp_path, holdout=10), str(sighted))
    assert [len(manifest) for manifest in (*prepared.train, *prepared.eval)] == [50, 10]


@pytest.mark.parametrize("change", ["missing", "other"])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_an_image_that_changed_is_found_before_the_run_begins(tmp_path, sighted, kind, change):
    """Of a set that is tokenized already; one that looks the same is found when it is read."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    records = [asked(f"{number % 5}.png", {"role": "user", "content": str(number)}) for number in range(10)]
    write_records(tmp_path / "a.jsonl", records)
    write_records(tmp_path / "b.jsonl", [asked("data:image/png;base64," + b64encode(picture(9)).decode())])
    paths = {name: {"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    seen, other = ("a", "b") if kind == "train" else ("b", "a")
    config = data_config(tmp_path, train=[paths[seen]], eval=[paths[other]])
    for _ in range(2):
        prepare(config, str(sighted))
    (tmp_path / "4.png").touch()
    prepare(config, str(sighted))
    for number in (3, 1):
        place = tmp_path / f"{number}.png"
        place.unlink() if change == "missing" else place.write_bytes(picture(0, (30, 30)))
    reason = "no longer exists" if change == "missing" else "has changed since it was tokenized"
    named = rf"^a: \S*a\.jsonl:2: {tmp_path}/1\.png: {reason} \(and 1 more of 5 images\); restore it, or set another data\.cache"
    with pytest.raises(RequestError, match=named):
        prepare(config, str(sighted))
    prepare(config, str(sighted), shown=[other for other in ("train", "eval") if other != kind])
    for number in (3, 1):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    prepare(config, str(sighted))
    (kept,) = [path for path in (tmp_path / "cache" / "media").rglob("*") if path.is_file()]
    kept.unlink()
    with pytest.raises(RequestError, match=rf"^b: \S*b\.jsonl:1: {kept}: no longer exists; restore it"):
        prepare(config, str(sighted))


def test_of_very_many_images_and_of_those_in_an_object_store_some_are_looked_at(tmp_path, sighted, monkeypatch):
    looked = list[str]()
    monkeypatch.setattr(media_files, "status", lambda location: (looked.append(location), files.status(location))[1])
    monkeypatch.setattr(ray_pipeline, "SHARD_RECORDS", 2)
    monkeypatch.setattr(media_files, "MOST", 4)
    monkeypatch.setattr(media_files, "MOST_REMOTE", 3)
    with s3_server() as server:
        for number in range(12):
            (tmp_path / f"{number}.png").write_bytes(picture(number))
            StoragePath.of(server.uri(f"{number}.png")).write_bytes(picture(number))
        write_records(tmp_path / "a.jsonl", [asked(f"{number}.png") for number in range(12)])
        for folder, wanted in ((tmp_path, {0, 1, 6, 7}), (StoragePath.of(server.uri("")), {0, 6})):
            config = data_config(tmp_path, media_dir=str(folder) if folder == tmp_path else folder.location)
            for _ in range(2):
                looked.clear()
                prepare(config, str(sighted))
            assert {int(Path(str(StoragePath(place))).stem) for place in looked} == wanted
        server.fails("png", 90)
        started = time.monotonic()
        prepare(config, str(sighted))
        assert time.monotonic() - started < 60


def test_a_model_for_text_alone_says_so_before_an_image_is_looked_for(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [asked("none.png")])
    with pytest.raises(RequestError, match="has no image processor"):
        written(shard_set(tmp_path, model), str(model))
