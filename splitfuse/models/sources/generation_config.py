"""Which tokens end a text, as a checkpoint's files say."""

from __future__ import annotations

import json
from pathlib import Path

from splitfuse.errors import ModelError


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """From generation_config.json, else config.json: one id or a list of them; none is allowed.

    Raises ModelError if the entry is not made of token ids.
    """
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.exists():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{file} cannot be read as a JSON object: {error}") from error
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelError(f"eos_token_id in {file} must be a token id or a list of them, not {value!r}")
        return tuple(ids)
    return ()
