"""A real model: SmolLM2-135M-Instruct, a GGUF file in Q4_1 that a package carries. Run by `make test-extras`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from ragged_requests import Request, Runner
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import splitfuse
from splitfuse.errors import ConfigError
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.models.sources.hub import open_model
from splitfuse.models.sources.packaged import packaged_file
from splitfuse.models.sources.source import Piece
from splitfuse.models.weights import check_weights, load_decoder
from splitfuse.text.tokenizer import Tokenizer

pytestmark = pytest.mark.extras

QUESTION = "What is the capital of France? Answer in a sentence."  # else "L" in French and "The" are nearly a tie
TEXT = (
    "The Eiffel Tower was completed in 1889 for the World's Fair. It is 330 metres tall, and for 41 years it was the "
    "tallest structure in the world; today more than 6,000,000 people visit it every year.\n\n"
    'def greet(name):\n    return f"Hello, {name}!"  # naïve 世界 😀\n'
)


@pytest.fixture(scope="module")
def path() -> Path:
    return packaged_file("smollm2")


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline("smollm2", max_model_len=1024)


def test_its_metadata_says_what_the_network_is() -> None:
    source = open_model("smollm2")
    spec = load_spec(source)
    assert isinstance(source, GgufModel) and source.name == "smollm2"
    assert (spec.architecture, len(spec.layers), spec.hidden_size) == ("LlamaForCausalLM", 30, 576)
    assert (spec.vocab_size, spec.max_position, spec.tied_embeddings) == (49152, 8192, True)
    assert (spec.ropes[0].theta, spec.dtype) == (100_000.0, "bfloat16")
    assert source.eos_token_ids() == (2, 0)


def test_its_weights_are_those_that_gguf_dequantizes(path: Path) -> None:
    weights = GgufModel(path).weights()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in {
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.embed_tokens.weight": "token_embd.weight",
    }.items():
        tensor = stored[theirs]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        with weights.read_quantized(Piece(ours, tuple(expected.shape))) as quantized:
            assert torch.equal(quantized.dequantize(torch.float32), expected)


def test_its_logits_and_tokens_are_those_of_transformers(path: Path) -> None:
    """transformers dequantizes the file by itself, to fp32."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    oracle = LlamaForCausalLM(LlamaConfig.from_pretrained(path.parent, gguf_file=path.name)).float().eval()
    oracle.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=oracle)["tensors"], False)
    source = open_model("smollm2")
    tokens = Tokenizer.from_source(source).encode(TEXT)
    assert list(tokens) == tokenizer.encode(TEXT)
    weights = source.weights()
    spec = check_weights(weights, load_spec(source))
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "backend": ReferenceBackend()}
    request = Request(list(tokens))
    Runner(load_decoder(weights, spec, **options), block_size=16).step([(request, request.num_pending)])
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([tokens])).logits[0]
    assert (torch.stack(request.logits) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_it_knows_the_capital_of_france(pipe: splitfuse.Pipeline) -> None:
    [answer] = pipe(QUESTION, chat=True, do_sample=False, max_new_tokens=40)
    assert "The capital of France is Paris" in answer.generated_text and answer.finish_reason == "stop"
    assert "Q4_1" in str(pipe.engine.model.plan)


def test_a_conversation_goes_through_a_pipe() -> None:
    command = [sys.executable, "-m", "splitfuse.cli", "chat", "--model", "smollm2", "--temperature", "0"]
    ended = subprocess.run(
        [*command, "--max-model-len", "512"], input=f"{QUESTION}\n", capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "Paris" in ended.stdout


def test_it_is_not_quantized_a_second_time() -> None:
    with pytest.raises(ConfigError, match=r"Q4_1.*leave quantization out"):
        splitfuse.pipeline("smollm2", quantization="int8")
