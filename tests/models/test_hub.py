"""Where models are found, and what is said when they are not. The Hub is played by a local server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from splitfuse.errors import ModelError, ModelNotFoundError
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources import hub
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.hub import open_model


class Hub(BaseHTTPRequestHandler):
    """Answers with the status and error code that the name of the model spells, such as owner/404-RepoNotFound."""

    def do_GET(self) -> None:
        status, code = self.path.split("/api/models/owner/")[1].split("/")[0].split("-")
        self.send_response(int(status))
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name http.server calls

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub on this machine, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "cache"))


def refused(model: str, revision: str | None = None) -> str:
    with pytest.raises(ModelNotFoundError) as error:
        open_model(model, revision)
    return str(error.value)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert open_model(str(tmp_path)).location == str(tmp_path)
    assert open_model("owner/name").location == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_model("~/owner").location == str(tmp_path / "owner")


def test_no_name_means_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED_MODEL", tmp_path)
    assert open_model(None).location == str(tmp_path)
    monkeypatch.setattr(hub, "BUNDLED_MODEL", tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match="lacks the bundled model"):
        open_model(None)


@pytest.mark.parametrize("model", ["./gone", "../gone", "/gone", "~/gone", "a/b/c", "a\\b", "gone/", "~nobody/gone"])
def test_paths_never_go_to_the_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    assert refused(model) == f"there is no folder {model}"


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file: name the folder" in refused(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["", "two words", "a--b", "name.", "ünïcode", "-a", "x" * 97, "x" * 5000, "a\0b"])
def test_malformed_name(model: str) -> None:
    assert "is neither a folder nor a Hub name" in refused(model)


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("owner/404-RepoNotFound", None, "is neither a folder nor a model on the Hub; if it is private"),
        ("owner/401-RepoNotFound", None, "is neither a folder nor a model on the Hub; if it is private"),
        ("owner/403-GatedRepo", None, "is gated: ask for access"),
        ("owner/401-GatedRepo", None, "is gated: ask for access"),
        ("owner/404-RevisionNotFound", "v9", "at revision v9 does not exist on the Hub, although the model does"),
        ("owner/418-Teapot", None, "a local folder works without it"),
    ],
)
@pytest.mark.usefixtures("online")
def test_errors_of_the_hub(model: str, revision: str | None, message: str) -> None:
    said = refused(model, revision)
    assert said.startswith(model)
    assert message in said


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1", tmp_path)
    message = refused("owner/name")
    assert "the Hub cannot be reached" in message
    assert "a local folder works without it" in message


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in refused("owner/name")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        ModelFolder(tmp_path).config()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_spec(ModelFolder(tmp_path))


def test_config_that_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, not list"):
        load_spec(ModelFolder(tmp_path))


def test_config_without_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no architecture"):
        load_spec(ModelFolder(tmp_path))
