"""The bundled model with tokens for thoughts, which it was not trained to write, and a template that opens them."""

import json
import shutil
from pathlib import Path

from splitfuse.models.sources.hub import BUNDLED_MODEL

GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
OPENS = (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{# to </think> #}{% endif %}{% endif %}"
)


def thinking_model(folder: Path) -> str:
    """Write the model into a folder, and return its path."""
    for file in Path(BUNDLED_MODEL).iterdir():
        shutil.copy(file, folder / file.name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    markers = "<think>", "</think>"
    tokenizer["added_tokens"] += [{"id": first + i, "content": marker, **flags} for i, marker in enumerate(markers)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert GENERATION in config["chat_template"]
    config["chat_template"] = config["chat_template"].replace(GENERATION, OPENS)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
