"""Tries lm-eval: log-likelihoods by its completions model, answers by its chat model. Its tasks need the Hub, so that
requests are made here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENAI_API_KEY", "none")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from benchmarks.clients.features import MODEL, STORY, V1, check, feature, run

COMMON = {"model": MODEL, "num_concurrent": 4, "max_retries": 1, "tokenizer_backend": None}


@feature("completions")
def completions() -> None:
    model = LocalCompletionsAPI(base_url=f"{V1}/completions", tokenized_requests=False, **COMMON)
    until = {"until": ["."], "max_gen_toks": 8}
    asked = [Instance("generate_until", {}, ("Once upon a time", until), i) for i in range(8)]
    check(all(model.generate_until(asked)))


@feature("chat")
def chat() -> None:
    model = LocalChatCompletion(base_url=f"{V1}/chat/completions", **COMMON)
    until = {"until": ["."], "max_gen_toks": 8}
    prompt = model.apply_chat_template([{"role": "user", "content": STORY}])
    asked = [Instance("generate_until", {}, (prompt, until), i) for i in range(8)]
    check(all(isinstance(text, str) for text in model.generate_until(asked)))


run()
