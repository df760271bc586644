"""Find a model: the bundled one, a folder, or one of the Hugging Face Hub."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from splitfuse.errors import ModelNotFoundError
from splitfuse.models.sources.files import INDEX_FILE, SINGLE_FILE, shard_names
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.source import SMALL_FILES, ModelSource

BUNDLED_MODEL = Path(__file__).parents[2] / "assets" / "storyteller"

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a folder that cannot be written, or not further."""


def open_model(model: str | None, revision: str | None = None, *, weights: bool = True) -> ModelSource:
    """Open a model by folder or Hub name; None is the bundled model. Models of the Hub are fetched into its cache,
    without their weights if `weights` is False.

        open_model("Qwen/Qwen2.5-0.5B-Instruct", revision="main").config()

    Raises ModelNotFoundError if there is no such folder or name, or if it cannot be fetched.
    """
    if model is None:
        if not BUNDLED_MODEL.is_dir():
            raise ModelNotFoundError("this installation lacks the bundled model: name a model folder or a Hub name")
        return ModelFolder(BUNDLED_MODEL)
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return ModelFolder(path)
        if path.is_file():
            raise ModelNotFoundError(f"{model} is a file: name the folder that holds config.json and the weights")
    except (OSError, RuntimeError):
        pass  # too long for a path, or the home of a user who does not exist
    if model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1:
        raise ModelNotFoundError(f"there is no folder {model}")
    # Only what is read is fetched: never pickles, code or copies in other formats.
    read = (*SMALL_FILES, "adapter_config.json", *((SINGLE_FILE, INDEX_FILE) if weights else ()))
    path = _fetch(model, revision, read)
    if weights and not (path / SINGLE_FILE).exists() and (path / INDEX_FILE).exists():
        _fetch(model, path.name, shard_names(path))  # of the same commit, whose folder has its name
    return ModelFolder(path)


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
        reason = (
            f"is no folder here; as a Hub name it is not in the local cache, and {offline} ({type(error).__name__}); a "
            "local folder works without it"
        )
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            reason = f"cannot be stored: {error.strerror} ({error.filename}); set HF_HOME to a folder with room"
    raise ModelNotFoundError(f"{named} {reason}")
