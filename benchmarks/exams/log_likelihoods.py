"""lm-eval's log-likelihoods over HTTP against those of transformers, for 50 texts on the bundled model.

    python -m benchmarks.exams.log_likelihoods --lm-eval PYTHON [--texts N] [SERVE FLAGS ...]

PYTHON is that of an environment with `lm_eval[api]` and `transformers`. transformers computes in fp32, so serve with
`--dtype float32` to see equality, and without to see what bf16 changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from random import Random

import torch
from server_process import server_process
from stories import make_story
from transformers import AutoModelForCausalLM

from splitfuse.models.sources.hub import BUNDLED_MODEL

DRIVER = Path(__file__).with_name("drive_lm_eval.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", required=True, metavar="PYTHON")
    parser.add_argument("--texts", type=int, default=50)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="exam-"))
    pairs, out = folder / "pairs.json", folder / "out.json"
    pairs.write_text(json.dumps([_pair(i) for i in range(arguments.texts)]), encoding="utf-8")
    with server_process(folder, f"exam-{folder.name}", *flags) as server, server.client() as client:
        command = [arguments.lm_eval, str(DRIVER), client.url, str(BUNDLED_MODEL), str(pairs), str(out)]
        subprocess.run(command, check=True)
    oracle = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    differences, greedy, num_tokens = [], 0, 0
    for context, continuation, found, is_greedy in json.loads(out.read_text(encoding="utf-8")):
        expected, expected_greedy = _expected(oracle, context, continuation)
        differences.append(abs(found - expected))
        greedy += is_greedy == expected_greedy
        num_tokens += len(continuation)
    print(f"{len(differences)} texts, {num_tokens} scored tokens")
    print(f"largest difference of a text's log-likelihood {max(differences):.2e}, mean {_mean(differences):.2e}")
    print(f"is_greedy agrees for {greedy} of {len(differences)}")


def _pair(number: int) -> tuple[str, str]:
    """A context and its continuation: questions with their answers, right or not, and halves of stories."""
    story = make_story(Random(f"exam-{number}"), 20 + 12 * number, lambda sentence: len(sentence.split()))
    if number % 2:
        half = story.passage.rindex(" ", 0, len(story.passage) // 2)
        return story.passage[:half], story.passage[half:]
    question = story.questions[0]
    return f"{story.passage}\n\n{question.text}", f" {question.answer}"


@torch.inference_mode()
def _expected(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    chosen = torch.tensor(continuation)
    return float(logprobs.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
