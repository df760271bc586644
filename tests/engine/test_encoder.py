"""Bidirectional encoders: embeddings against transformers, whole and in chunks, alone and in company; refusals."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_encoders
import torch
from backends import why_not
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.errors import ConfigError, InvalidRequestError, ModelError, PromptTooLongError, UnsupportedModelError
from splitfuse.kernels.cpu.library import VARIANTS

RNG = Random(5)
TEXTS = [" ".join(RNG.choice(tiny_encoders.WORDS) for _ in range(RNG.choice((1, 4, 4, 20, 60)))) for _ in range(23)]
TEXTS.append("[PAD] the cat [PAD] sat")  # RoBERTa counts positions without it


def embedded(pipe: splitfuse.Pipeline, texts: list[str]) -> list[list[float]]:
    vectors = pipe.embed(texts)
    check_scheduler(pipe.engine.scheduler)
    assert pipe.engine.allocator.num_held == 0
    return vectors


@pytest.mark.parametrize(
    ("kind", "mode"), [("bert", "mean_tokens"), ("bert", "cls_token"), ("xlm", "mean_tokens"), ("roberta", "lasttoken")]
)
def test_embeddings_are_those_of_transformers(tmp_path: Path, kind: str, mode: str) -> None:
    model = tiny_encoders.save(tmp_path, kind, pooling=mode)
    for settings in ({}, {"max_num_batched_tokens": 16}, {"kernels": "torch"}):
        pipe = splitfuse.pipeline(tmp_path, **settings)
        for text, vector in zip(TEXTS, embedded(pipe, TEXTS), strict=True):
            wanted = tiny_encoders.expected(model, pipe.tokenizer.encode(text), mode)
            assert vector == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-5)


@pytest.mark.skipif(all(map(why_not, VARIANTS)), reason="the C++ kernels cannot be used here")
@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}], ids=["bf16", "int8"])
def test_the_same_bits_alone_and_in_any_company(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_encoders.save(tmp_path)
    pipe = splitfuse.pipeline(tmp_path, dtype="bfloat16", **settings)
    alone = [embedded(pipe, [text])[0] for text in TEXTS]
    for budget in (32, 512):
        crowd = splitfuse.pipeline(tmp_path, dtype="bfloat16", max_num_batched_tokens=budget, **settings)
        assert embedded(crowd, TEXTS) == alone
    wanted = [tiny_encoders.expected(model, pipe.tokenizer.encode(text), "mean_tokens") for text in TEXTS]
    near = torch.cosine_similarity(torch.tensor(alone), torch.stack(wanted))
    assert near.min() > (0.9999 if not settings else 0.999)


def test_texts_that_end_in_one_step_fit_the_planned_memory(tmp_path: Path) -> None:
    tiny_encoders.save(tmp_path)
    engine = splitfuse.pipeline(tmp_path, max_num_batched_tokens=32).engine
    together: list[list[int]] = []
    embed = engine.executor.encoder.embed

    def record(texts: list[tuple[int, ...]]) -> torch.Tensor:
        together.append(list(map(len, texts)))
        return embed(texts)

    engine.executor.encoder.embed = record
    for name, priority in (("a", 2), ("b", 1), ("c", 0)):  # each overtakes the one before
        options = SchedulingOptions(priority=priority)
        engine.add_request(name, [5] * 40, NOTHING_GENERATED, pooling=PoolingParams(), scheduling=options)
        engine.step()
    while engine.has_unfinished:
        engine.step()
    assert together == [[40, 40], [40]] and engine.executor.most_tokens == 32 + 66


def test_without_a_pooling_it_is_the_mean(tmp_path: Path) -> None:
    model = tiny_encoders.save(tmp_path, pooling=None)
    pipe = splitfuse.pipeline(tmp_path)
    wanted = tiny_encoders.expected(model, pipe.tokenizer.encode(TEXTS[0]), "mean_tokens")
    assert embedded(pipe, TEXTS[:1])[0] == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-5)


def test_it_generates_nothing(tmp_path: Path) -> None:
    tiny_encoders.save(tmp_path)
    pipe = splitfuse.pipeline(tmp_path)
    with pytest.raises(InvalidRequestError, match="this model is an encoder: it gives embeddings"):
        pipe("the cat")


def test_the_folder_bounds_a_text(tmp_path: Path) -> None:
    tiny_encoders.save(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    assert splitfuse.pipeline(tmp_path).engine.max_model_len == 12
    pipe = splitfuse.pipeline(tmp_path, max_model_len=20)
    assert len(pipe.embed(["cat " * 18])) == len(pipe.embed([[5] * 20])) == 1
    for text in ("cat " * 19, [5] * 21):
        with pytest.raises(PromptTooLongError, match=r"maximum context length is 20.* has 21 tokens"):
            pipe.embed([text])  # type: ignore[arg-type]
    with pytest.raises(PromptTooLongError, match=r"the model takes at most 20$"):
        pipe.embed(["cat " * 19])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": {"hidden_act": "silu"}}, "hidden_act 'silu' is not supported: gelu"),
        ({"config.json": {"position_embedding_type": "relative_key"}}, "position_embedding_type 'relative_key'"),
        ({"config.json": {"is_decoder": True}}, "is_decoder makes BertModel generate"),
        ({"config.json": {"add_cross_attention": True}}, "add_cross_attention = True"),
        ({"config.json": {"num_attention_heads": 5}}, "no multiple of num_attention_heads 5"),
        ({"config.json": {"model_type": "roberta"}}, "has the model_type bert, not 'roberta'"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling_mode_mean_tokens, pooling_mode_max"),
        ({"sentence_bert_config.json": {"max_seq_length": "many"}}, "max_seq_length must be a whole number"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case must be false, not True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny_encoders.save(tmp_path)
    for name, values in changes.items():
        file = tmp_path / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | values))
    with pytest.raises(ModelError, match=message):
        splitfuse.pipeline(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        *({"num_blocks": 8}, {"ttft": "1s"}, {"max_model_len": 67}, {"kv_cache_dtype": "int8"}),
        {"num_speculative_tokens": 7},
    ],
    ids=str,
)
def test_settings_that_it_does_not_have(tmp_path: Path, settings: dict[str, Any]) -> None:
    tiny_encoders.save(tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}.*(leave it out|66 positions)"):
        splitfuse.pipeline(tmp_path, **settings)


def test_a_transformer_in_another_folder_is_refused(tmp_path: Path) -> None:
    tiny_encoders.save(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="with the path '', not '0_Transformer'"):
        splitfuse.pipeline(tmp_path)


def test_a_module_that_is_unknown_is_refused(tmp_path: Path) -> None:
    tiny_encoders.save(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="a module 'Dense'"):
        splitfuse.pipeline(tmp_path)
