"""lm-eval's log-likelihoods over HTTP against those of transformers, for 50 texts on the bundled model.

    LM_EVAL_PYTHON=PYTHON pytest -m slow -s tests/server/test_lm_eval.py

PYTHON is that of an environment with `lm_eval[api]` and `transformers`. transformers computes in fp32, so the server
must equal it with `--dtype float32`; what bf16 changes is printed.
"""

import json
import os
import subprocess
from pathlib import Path
from random import Random
from statistics import mean

import pytest
import torch
from server_process import server_process
from stories import make_story
from transformers import AutoModelForCausalLM

from splitfuse.models.sources.hub import BUNDLED_MODEL

DRIVER = Path(__file__).with_name("drive_lm_eval.py")
NUM_TEXTS = 50
TOLERANCE = 1e-3
"""Largest difference of a text's log-likelihood in fp32."""


@pytest.mark.slow
@pytest.mark.skipif("LM_EVAL_PYTHON" not in os.environ, reason="LM_EVAL_PYTHON names no Python that has lm-eval")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_likelihoods_equal_those_of_transformers(tmp_path: Path, dtype: str) -> None:
    pairs, out = tmp_path / "pairs.json", tmp_path / "out.json"
    pairs.write_text(json.dumps([make_pair(i) for i in range(NUM_TEXTS)]), encoding="utf-8")
    with server_process(tmp_path, f"lm-eval-{dtype}", "--dtype", dtype) as server, server.client() as client:
        command = [os.environ["LM_EVAL_PYTHON"], str(DRIVER), client.url, str(BUNDLED_MODEL), str(pairs), str(out)]
        subprocess.run(command, check=True)
    oracle = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    differences, equally_greedy, num_tokens = [], 0, 0
    for context, continuation, found, is_greedy in json.loads(out.read_text(encoding="utf-8")):
        expected, expected_greedy = expected_score(oracle, context, continuation)
        differences.append(abs(found - expected))
        equally_greedy += is_greedy == expected_greedy
        num_tokens += len(continuation)
    print(f"\n{dtype}: {len(differences)} texts, {num_tokens} scored tokens")
    print(f"largest difference of a text's log-likelihood {max(differences):.2e}, mean {mean(differences):.2e}")
    print(f"is_greedy agrees for {equally_greedy} of {len(differences)}")
    assert len(differences) == NUM_TEXTS
    if dtype == "float32":
        assert max(differences) < TOLERANCE and equally_greedy == NUM_TEXTS


def make_pair(number: int) -> tuple[str, str]:
    """A context and its continuation: questions with their answers, right or wrong, and halves of stories."""
    story = make_story(Random(f"exam-{number}"), 20 + 12 * number, lambda sentence: len(sentence.split()))
    if number % 2:
        half = story.passage.rindex(" ", 0, len(story.passage) // 2)
        return story.passage[:half], story.passage[half:]
    question = story.questions[0]
    return f"{story.passage}\n\n{question.text}", f" {question.answer}"


@torch.inference_mode()
def expected_score(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    chosen = torch.tensor(continuation)
    return float(logprobs.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())
