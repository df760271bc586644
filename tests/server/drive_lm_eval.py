"""Run by a Python that has lm-eval: what its `local-completions` model gives for the pairs in a file.

    PYTHON drive_lm_eval.py URL TOKENIZER_FOLDER PAIRS.json OUT.json

PAIRS.json: [[context, continuation], ...]. OUT.json: [[context ids, continuation ids, log-likelihood, greedy], ...].
Prompts are sent as token ids, several in a request. Knows nothing of splitfuse.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def main() -> None:
    url, tokenizer, pairs, out = sys.argv[1:]
    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="storyteller",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=2048,
        batch_size=8,
        num_concurrent=4,
        max_retries=1,
    )
    texts = [tuple(pair) for pair in json.loads(Path(pairs).read_text(encoding="utf-8"))]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    rows = [
        [*model._encode_pair(*pair), *answer] for pair, answer in zip(texts, model.loglikelihood(requests), strict=True)
    ]
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
