"""Finds a model: the bundled one, a folder, a GGUF file, one of an installed package or of the Hugging Face Hub."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from splitfuse.errors import ModelNotFoundError
from splitfuse.models.sources.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, SINGLE_FILE, shard_names
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.gguf.container import part_names
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.models.sources.packaged import PACKAGES, packaged_file
from splitfuse.models.sources.source import SMALL_FILES, ModelSource, listing

BUNDLED_MODEL = Path(__file__).parents[2] / "assets" / "storyteller"

GGUF_SUFFIX = ".gguf"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a folder that cannot be written, or not further."""


def open_model(
    model: str | None, revision: str | None = None, *, gguf_file: str | None = None, weights: bool = True
) -> ModelSource:
    """Open a model by folder, GGUF file, Hub name or short name (`packaged.PACKAGES`); None is the bundled model.
    `gguf_file` chooses one of the GGUF files of a folder or Hub model, which `owner/name:file.gguf` does too. Models of
    the Hub are fetched into its cache, without their weights if `weights` is False: but GGUF files are whole.

        open_model("Qwen/Qwen2.5-0.5B-Instruct", revision="main").config()

    Raises ModelNotFoundError if there is no such folder, file or name, or if it cannot be fetched.
    """
    if model is None:
        _refuse_file(gguf_file, "set model too")
        if not BUNDLED_MODEL.is_dir():
            raise ModelNotFoundError("this installation lacks the bundled model: name a model folder or a Hub name")
        return ModelFolder(BUNDLED_MODEL)
    try:
        path = Path(model).expanduser()
        repository, _, file = model.rpartition(":")
        if gguf_file is None and repository and file.endswith(GGUF_SUFFIX) and not path.exists():
            path, model, gguf_file = Path(repository).expanduser(), repository, file
        if model and path.is_dir():
            return _open_folder(path, gguf_file)
        if path.is_file():
            _refuse_file(gguf_file, f"{model} is a file itself, so leave it out")
            return _open_file(path)
    except (OSError, RuntimeError):
        pass  # too long for a path, or the home of a user who does not exist
    if model in PACKAGES:
        _refuse_file(gguf_file, f"{model} is one file, so leave it out")
        return GgufModel(packaged_file(model), model)
    if _is_path(model):
        raise ModelNotFoundError(
            f"there is no folder {model}: name a model folder, a GGUF file or a Hub model such as owner/name"
        )
    if gguf_file is not None:
        return _open_hub_file(model, revision, gguf_file)
    # Only what is read is fetched: never pickles, code or copies in other formats.
    read = (*SMALL_FILES, ADAPTER_CONFIG, *((SINGLE_FILE, INDEX_FILE) if weights else ()))
    path = _fetch(model, revision, read)
    whole = (SINGLE_FILE, INDEX_FILE) if weights else ("tokenizer.json", SINGLE_FILE, INDEX_FILE)
    if not any((path / file).exists() for file in whole) and (files := _hub_gguf_files(model, revision, path)):
        return _open_hub_file(model, revision, _only_file(model, files))
    if weights and not (path / SINGLE_FILE).exists() and (path / INDEX_FILE).exists():
        _fetch(model, path.name, shard_names(path))  # of the same commit, whose folder has its name
    return ModelFolder(path)


def check_revision(revision: str | None, model: str | None, tokenizer: str | None) -> None:
    """Raise ModelNotFoundError for a revision of a model and a tokenizer that both do not come from the Hub."""
    if revision is None or _may_be_of_hub(model) or _may_be_of_hub(tokenizer):
        return
    name = "the bundled model" if model is None else f"{model:.200}"
    raise ModelNotFoundError(
        f"revision {revision:.200} is a branch, tag or commit of a Hub model such as Qwen/Qwen2.5-0.5B-Instruct, and "
        f"{name} is none: leave it out"
    )


def _may_be_of_hub(model: str | None) -> bool:
    if model is None or model in PACKAGES or _is_path(model):
        return False
    try:
        return not Path(model).exists()
    except OSError:  # too long for a path, which its reader says
        return True


def _refuse_file(gguf_file: str | None, advice: str) -> None:
    if gguf_file is not None:
        raise ModelNotFoundError(f"gguf_file {gguf_file:.200} is a file of a folder or Hub model: {advice}")


def adapter_folder(adapter: str) -> Path:
    """Return the folder of a LoRA adapter, by its path or Hub name; of the Hub only what is read is fetched.

    Raises ModelNotFoundError if there is neither.
    """
    try:
        path = Path(adapter).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a home that is unknown, a null byte
        raise ModelNotFoundError(f"{adapter!r:.200} is no folder of an adapter: {error!s:.200}") from error
    if _is_path(adapter) or "/" not in adapter:
        raise ModelNotFoundError(f"there is no folder {adapter:.200} with an adapter")
    return _fetch(adapter, None, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def _is_path(name: str) -> bool:
    """Return whether a name is that of a folder or file, and not one of the Hub."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _open_file(path: Path) -> ModelSource:
    if path.suffix != GGUF_SUFFIX:
        raise ModelNotFoundError(
            f"{path} is a file: name the folder that holds config.json and the weights, or a GGUF file, whose name "
            f"ends in {GGUF_SUFFIX}"
        )
    return GgufModel(path)


def _open_folder(path: Path, gguf_file: str | None) -> ModelSource:
    """Return the model in a folder: of safetensors files if it has such, else of GGUF files."""
    if gguf_file is None and any((path / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        return ModelFolder(path)
    files = _first_parts(file.name for file in path.glob(f"*{GGUF_SUFFIX}"))
    if gguf_file is None:
        return GgufModel(path / _only_file(str(path), files)) if files else ModelFolder(path)
    if not re.fullmatch(r"[^/\\]+", gguf_file) or not (path / gguf_file).is_file():
        raise _absent_file(str(path), gguf_file, files)
    return GgufModel(path / gguf_file)


def _open_hub_file(model: str, revision: str | None, gguf_file: str) -> ModelSource:
    """Return the model in a GGUF file of a Hub model, fetched with the files that it is split into."""
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*\.gguf", gguf_file) or ".." in gguf_file:
        raise ModelNotFoundError(f"{gguf_file:.200} is not the name of a GGUF file of a Hub model, as in Q4_K_M.gguf")
    folder = Path(gguf_file).parent
    path = _fetch(model, revision, [str(folder / name) for name in part_names(Path(gguf_file).name)])
    if not (path / gguf_file).is_file():
        raise _absent_file(model, gguf_file, _hub_gguf_files(model, revision, path))
    return GgufModel(path / gguf_file)


def _hub_gguf_files(model: str, revision: str | None, snapshot: Path) -> list[str]:
    """Return the GGUF files of a Hub model, the first of each split one; those in the cache without the Hub."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(model, revision=revision)
    except Exception:  # of many kinds, as in _fetch
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob(f"*{GGUF_SUFFIX}")]
    return _first_parts(file for file in files if file.endswith(GGUF_SUFFIX))


def _first_parts(files: Iterable[str]) -> list[str]:
    """Return the files that models begin in: those of which another is the first are left out, and image encoders."""
    names = [file for file in files if not Path(file).name.startswith("mmproj")]
    return sorted(file for file in names if part_names(Path(file).name)[0] == Path(file).name)


def _only_file(model: str, files: list[str]) -> str:
    if len(files) > 1:
        raise ModelNotFoundError(
            f"{model} has {len(files)} GGUF files: choose one with gguf_file (--gguf-file): {listing(files, 30)}"
        )
    return files[0]


def _absent_file(model: str, gguf_file: str, files: list[str]) -> ModelNotFoundError:
    there = f"its GGUF files are {listing(files, 30)}" if files else "it has no GGUF files"
    return ModelNotFoundError(f"{model} has no file {gguf_file:.200}: {there}")


def _fetch(model: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return a snapshot of a Hub model in the local cache, with those of `files` that the model has. HF_HUB_OFFLINE,
    HF_ENDPOINT and HF_TOKEN are respected.
    """
    import huggingface_hub  # only here: most starts need no Hub
    from huggingface_hub import errors

    named = model if revision is None else f"{model} at revision {revision}"
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except errors.HFValidationError:
        reason = "is neither a folder nor a Hub name, which looks like owner/name"
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its Hub page, then set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "does not exist on the Hub, although the model does"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder nor a model on the Hub; if it is private there, set HF_TOKEN"
    except errors.HfHubHTTPError as error:
        reason = f"was refused by the Hub ({error}); a local folder works without it"
    except ImportError as error:  # of a SOCKS proxy in the environment
        reason = f"cannot be fetched: {error}"
    except Exception as error:  # every HTTP library that the Hub client has used brings exceptions of its own
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        cause = "" if isinstance(error, errors.LocalEntryNotFoundError) else f" ({type(error).__name__})"
        reason = f"is neither a folder here nor in the local cache of the Hub, and {offline}{cause}: name a folder"
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            reason = f"cannot be stored: {error.strerror} ({error.filename}); set HF_HOME to a folder with room"
    raise ModelNotFoundError(f"{named} {reason}")
