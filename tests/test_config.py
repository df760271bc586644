"""Settings: names, types and ranges are checked once, at the edge, and never change afterwards."""

import dataclasses
import os
import re
from typing import Any

import pytest

from splitfuse.config.engine import PARTS, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, change_settings
from splitfuse.config.server import ServerConfig
from splitfuse.config.values import parse_seconds
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError


def test_flat_settings_are_sorted_into_their_parts() -> None:
    config = EngineConfig.from_settings({"dtype": "float32", "block_size": 16, "max_num_seqs": 3, "num_blocks": 7})
    assert config == EngineConfig(
        model=ModelConfig(dtype="float32"),
        scheduler=SchedulerConfig(max_num_seqs=3),
        cache=CacheConfig(block_size=16, num_blocks=7),
    )
    assert EngineConfig.from_settings({}) == EngineConfig()


def test_settings_have_unique_names_and_a_sentence_of_help() -> None:
    names = [field.name for part in PARTS.values() for field in dataclasses.fields(part)]
    assert sorted(names) == sorted(EngineConfig.setting_fields())
    for part, field in EngineConfig.setting_fields().values():
        assert field.metadata["help"].endswith("."), f"{part.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_batched_tokens", "max_num_batched_tokens"),
        ("max_seq", "max_num_seqs"),
        ("blocksize", "block_size"),
        ("prefix_caching", "enable_prefix_caching"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{wrong}'; did you mean '{right}'"):
        EngineConfig.from_settings({wrong: 1})


def test_an_unknown_setting_unlike_any_is_refused_with_all() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown setting 'zzz'; known: batch_invariant, block_size, cuda_graphs, device, draft_model, dtype,",
    ):
        EngineConfig.from_settings({"zzz": 1})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", 5, "model must be str or None, not 5"),
        ("dtype", None, "dtype must be str, not None"),
        ("dtype", "int8", "dtype must be one of auto, bfloat16, float16, float32, not 'int8'"),
        ("load_format", "pickle", "load_format must be one of safetensors, dummy, not 'pickle'"),
        ("max_model_len", 1, "max_model_len must be at least 2, not 1"),
        ("max_model_len", "9", "max_model_len must be int or None, not '9'"),
        ("max_num_batched_tokens", 0, "max_num_batched_tokens must be at least 1, not 0"),
        ("max_num_batched_tokens", 1.5, "max_num_batched_tokens must be int or None, not 1.5"),
        ("max_num_batched_tokens", True, "max_num_batched_tokens must be int or None, not True"),
        ("max_num_seqs", -1, "max_num_seqs must be at least 1, not -1"),
        ("tail_share", 0.0, "tail_share must be above 0 and at most 0.5, not 0.0"),
        ("tail_share", 0.6, "tail_share must be above 0 and at most 0.5, not 0.6"),
        ("tail_share", float("nan"), "tail_share must be above 0 and at most 0.5, not nan"),
        ("block_size", 0, "block_size must be at least 1, not 0"),
        ("num_blocks", 0, "num_blocks must be at least 1, not 0"),
        ("kv_cache_memory_gib", 0, "kv_cache_memory_gib must be a positive number, not 0"),
        ("kv_cache_memory_gib", -1.0, "kv_cache_memory_gib must be a positive number, not -1.0"),
        ("kv_cache_memory_gib", float("nan"), "kv_cache_memory_gib must be a positive number, not nan"),
        ("kv_cache_memory_gib", float("inf"), "kv_cache_memory_gib must be a positive number, not inf"),
        ("kv_cache_memory_gib", "1", "kv_cache_memory_gib must be float or None, not '1'"),
        ("enable_prefix_caching", 1, "enable_prefix_caching must be bool, not 1"),
        ("quantization", "fp8", "quantization must be one of int8, int4, not 'fp8'"),
        ("quantization", 8, "quantization must be str or None, not 8"),
        ("quantization_group_size", 64, "quantization_group_size 64 needs quantization int8 or int4: set that too"),
        ("quantization_group_size", "64", "quantization_group_size must be int or None, not '64'"),
        (
            "kernels",
            "cuda",
            "kernels must be one of auto, avx512_amx, avx512_bf16, avx512, avx2, triton, torch, reference, not 'cuda'",
        ),
        ("kernels", None, "kernels must be str, not None"),
        ("num_threads", 0, "num_threads must be at least 1, not 0"),
        ("num_threads", 100_000, "num_threads must be at most 1024, not 100000"),
        ("num_threads", "2", "num_threads must be int or None, not '2'"),
        ("kv_cache_dtype", "int4", "kv_cache_dtype must be one of auto, int8, fp8, not 'int4'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig.from_settings({name: value})
    assert str(refusal.value) == message


def test_a_whole_number_is_a_number() -> None:
    assert EngineConfig.from_settings({"kv_cache_memory_gib": 1}).cache.kv_cache_memory_gib == 1


def test_the_cache_has_one_size() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks 1 and kv_cache_memory_gib 1.0 .* give one of them"):
        EngineConfig.from_settings({"num_blocks": 1, "kv_cache_memory_gib": 1.0})


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_group_sizes_of_a_quantization(quantization: str) -> None:
    for size in (None, 64, 128):  # which of them int8 takes is for the kernels to say
        config = EngineConfig.from_settings({"quantization": quantization, "quantization_group_size": size})
        assert config.model.quantization_group_size == size
    with pytest.raises(ConfigError, match="quantization_group_size must be 64 or 128, not 32"):
        EngineConfig.from_settings({"quantization": quantization, "quantization_group_size": 32})


def test_settings_are_frozen() -> None:
    config = EngineConfig()
    for part in (config.model, config.scheduler, config.cache):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = ModelConfig()  # type: ignore[misc]


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1.0), ("250ms", 0.25), (" 1.5 s", 1.5), ("2min", 120.0)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_seconds("itl", text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "3", "1h", "0s", "-1s", "nan", "inf", "1s2", "3/p99", "5e-324s", "1e-9ms", "1e300s", "1e5s"]
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="itl must be a time"):
        SchedulerConfig(itl=text)


def test_ttft_may_depend_on_the_length_of_the_prompt() -> None:
    assert SloTargets.parse("2ms/token", "0.1s") == SloTargets(None, 0.1, ttft_per_token=0.002)
    assert SloTargets.parse("2s", None) == SloTargets(2.0, None)
    assert SloTargets.parse() == SloTargets()
    with pytest.raises(ConfigError, match="ttft must be a time"):
        SchedulerConfig(ttft="fast/token")


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ({"itl": "250ms"}, SloTargets(itl=0.25)),
        ({"itl": "250ms/p99"}, SloTargets(itl=0.25, itl_percentile=99.0)),
        ({"itl": "1s / p99.9"}, SloTargets(itl=1.0, itl_percentile=99.9)),
        ({"tpot": "100ms"}, SloTargets(tpot=0.1)),
        ({"ttft": "1s", "itl": "250ms/p95", "tpot": "0.1s"}, SloTargets(1.0, 0.25, tpot=0.1, itl_percentile=95.0)),
        ({"ttft": "2ms/token", "tpot": "50ms"}, SloTargets(ttft_per_token=0.002, tpot=0.05)),
    ],
)
def test_targets_of_each_measure(given: dict[str, str], targets: SloTargets) -> None:
    config = EngineConfig.from_settings(given)
    assert config.scheduler.targets == given and config.scheduler.slo_enabled
    assert SloTargets.parse(**config.scheduler.targets) == targets
    assert EngineConfig.from_settings(config.settings) == config


@pytest.mark.parametrize("measure", ["p0", "p100", "99", "p", "", "pnan", "p-1", "token", "p99/p50", "p1e999"])
def test_an_itl_of_an_invalid_percentile_is_refused(measure: str) -> None:
    message = f"itl '250ms/{measure}' must end with a percentile above p0 and below p100, such as 250ms/p99"
    with pytest.raises(ConfigError, match=re.escape(message)):
        SchedulerConfig(itl=f"250ms/{measure}")


@pytest.mark.parametrize("text", ["0s", "100", "100ms/p99", "2ms/token", "2days"])
def test_an_invalid_tpot_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tpot must be a time .*such as .*250ms, not "):
        SchedulerConfig(tpot=text)


@pytest.mark.parametrize("name", ["step_timeout", "drain_timeout", "client_timeout"])
def test_a_timeout_that_no_timer_keeps_is_refused(name: str) -> None:
    for value in (0.0, 5e-324, 1e-9, 1e7, 1e300, float("inf"), float("nan"), -1.0):
        with pytest.raises(ConfigError, match=f"^{name} must be a number of seconds from 0.001 to 1000000, not"):
            ServerConfig.from_settings({name: value})


@pytest.mark.parametrize(("part", "name"), [(ServerConfig, "max_body_mib"), (EngineConfig, "kv_cache_memory_gib")])
def test_a_size_that_is_no_number_of_bytes_is_refused(part: type[ServerConfig | EngineConfig], name: str) -> None:
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"^{name} must be a positive number, not"):
            part.from_settings({name: value})
    with pytest.raises(ConfigError, match=f"^{name} must be at most 1000000000, not"):
        part.from_settings({name: 1e300})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_replicas": 1, "replicas": 2}, "max_replicas must be at least replicas, which is 2, and at most 4096"),
        ({"max_replicas": 0}, "max_replicas must be at least replicas, which is 1"),
        (
            {"max_replicas": 2, "engine": ("10.0.0.2:9000",), "key_file": "key"},
            "max_replicas needs replicas of at least 1",
        ),
        ({"ray": "ray://10.0.0.2:10001"}, "is of Ray's client, which places nothing: give host:port of the head"),
        ({"ray": "10.0.0.2"}, "ray must be an address and a port, such as 10.0.0.2:9000"),
        ({"ray": "auto", "ray_memory": "16"}, "ray_memory"),
        ({"ray_memory": "16GiB"}, "ray_memory is for replicas on Ray: set ray, or leave it out"),
        ({"autoscale": "4"}, "autoscale must be the least and the largest number of replicas, such as 1:4, not '4'"),
        ({"autoscale": "4:1"}, "autoscale must be the least and the largest number of replicas"),
        ({"autoscale": "1:4", "max_replicas": 4}, "autoscale and max_replicas are mutually exclusive"),
        ({"autoscale": "1:4", "replicas": 5}, "replicas 5 must be from 1 to 4, as autoscale says, or be left out"),
        ({"ray": "auto", "ray_timeout": 0.0}, "ray_timeout must be a number of seconds"),
        ({"ray_timeout": 300.0}, "ray_timeout is for replicas on Ray: set ray, or leave it out"),
        (
            {"max_replicas": 4, "replicas": 2, "roles": "prompt:1,generation:1"},
            "max_replicas and roles are mutually exclusive: leave one of them out",
        ),
        (
            {"autoscale": "1:8", "engine_listen": "10.0.0.1:65529", "engine": ("10.0.0.2:9000",), "key_file": "key"},
            "engine_listen 10.0.0.1:65529 must have a port with 7 more behind it",
        ),
        ({"record_max_mib": 512.0}, "record_max_mib is for a recording: set record, or leave it out"),
    ],
    ids=str,
)
def test_replicas_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerConfig.from_settings(settings)


def test_how_many_replicas_there_can_be() -> None:
    elsewhere = {"engine": ("10.0.0.2:9000",), "key_file": "key"}
    for settings, at_first, at_most in (
        ({}, 1, 1),
        ({"replicas": 2}, 2, 2),
        ({"max_replicas": 4}, 1, 4),
        (elsewhere, 0, 0),
        ({"ray": "local"}, 1, 256),
        ({"autoscale": "2:5", **elsewhere}, 2, 5),
        ({"autoscale": "2:5", "replicas": 3}, 3, 5),
        ({"ray": "auto", "replicas": 300}, 300, 300),
        ({"ray": "auto", "max_replicas": 8, **elsewhere}, 1, 8),
        ({"ray": "auto", "replicas": 2, "roles": "prompt:1,generation:1"}, 2, 2),
        ({"autoscale": "1:8", "engine_listen": "10.0.0.1:65528", **elsewhere}, 1, 8),
    ):
        config = ServerConfig.from_settings(settings)
        assert (config.num_replicas, config.most_replicas) == (at_first, at_most)
        assert config.max_engines - config.most_replicas == len(config.engine)


@pytest.mark.parametrize("part", [ServerConfig, EngineConfig])
def test_no_setting_is_an_empty_text(part: type[ServerConfig | EngineConfig]) -> None:
    fields = [each.name for each in dataclasses.fields(ServerConfig)]
    for name in list(EngineConfig.setting_fields()) if part is EngineConfig else fields:
        for empty in ("", " "):
            with pytest.raises(ConfigError, match=name):
                part.from_settings({name: empty})


def test_a_path_whose_bytes_are_not_utf_8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model '/models/\\udce9' is not UTF-8: rename it, or set LC_ALL=C.UTF-8"):
        EngineConfig.from_settings({"model": os.fsdecode(b"/models/\xe9")})


@pytest.mark.parametrize("origin", ["*", "null", "https://page.example", "http://[::1]:3000", "tauri://localhost"])
def test_an_origin_is_as_browsers_write_it(origin: str) -> None:
    assert ServerConfig.from_settings({"allow_origin": [origin]}).allow_origin == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "page.example",
        "https://page.example/",
        "https://Page.example",
        "https://page.example:443",
        "http://a:80",
        "a://",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=f"allow_origin must be an origin .* such as https://.*, not '{origin}'"):
        ServerConfig.from_settings({"allow_origin": ["*", origin]})


def test_another_model_is_at_no_revision_of_the_one_before() -> None:
    hub = {"model": "owner/name", "revision": "v1", "gguf_file": "a.gguf", "dtype": "float32"}
    assert change_settings(hub, {"model": "owner/name"}) == hub
    folder = {"model": "/models/name", "gguf_file": "a.gguf", "dtype": "float32"}
    assert change_settings(hub, {"model": "/models/name"}) == folder
    assert change_settings(hub, {"model": "/b.gguf"}) == {"model": "/b.gguf", "dtype": "float32"}
    assert change_settings(hub, {"model": "a/b", "revision": "v2"})["revision"] == "v2"
