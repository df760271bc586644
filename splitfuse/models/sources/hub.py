"""Where a model's files are: the bundled model, a folder, or the Hugging Face Hub. Knows no tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitfuse.errors import ModelError, ModelNotFoundError

BUNDLED_MODEL = Path(__file__).parents[2] / "assets" / "storyteller"

FETCHED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]  # never pickles, never code


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """The folder of a model: None is the bundled one, a folder is itself, any other name is looked up on the Hub.

    Raises ModelNotFoundError if there is no such folder or name, or if it cannot be fetched.
    """
    if model is None:
        if not BUNDLED_MODEL.is_dir():
            raise ModelNotFoundError("this installation lacks the bundled model: name a model folder or a Hub name")
        return BUNDLED_MODEL
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return path
        if path.is_file():
            raise ModelNotFoundError(f"{model} is a file: name the folder that holds config.json and the weights")
    except (OSError, RuntimeError):
        pass  # too long for a path, or the home of a user there is not
    if model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1:
        raise ModelNotFoundError(f"there is no folder {model}")
    return _download(model, revision)


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises ModelNotFoundError if there is none, ModelError if it is not a JSON object.
    """
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} has no config.json: it is not a model folder in Hugging Face format"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


def _download(model: str, revision: str | None) -> Path:
    """A snapshot of a Hub model in the local cache. HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are respected."""
    import huggingface_hub  # only here: most starts need no Hub
    from huggingface_hub import errors

    named = model if revision is None else f"{model} at revision {revision}"
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=FETCHED_FILES))
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
    except Exception as error:  # every HTTP library that the Hub client has used brings exceptions of its own
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        reason = f"is not in the local cache, and {offline} ({type(error).__name__}); a local folder works without it"
    raise ModelNotFoundError(f"{named} {reason}")
