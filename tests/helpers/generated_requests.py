"""Requests generated from the OpenAPI document of a server, valid and malformed, made short enough to wait for."""

from collections.abc import Callable
from typing import Any

import hypothesis
from schemathesis import GenerationMode

from splitfuse.server.anthropic.conversation import OF_ROLE

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
OF_MODEL = ("tool_choice", "reasoning_effort", "verbosity", "reasoning_max_tokens", "thinking_token_budget")
"""Fields that need tools, or a model that thinks."""


def for_generated(
    operation: Any, mode: GenerationMode, most: int, call: Callable[[Any], None], *, seed: int | None = None
) -> None:
    """Call with at most so many cases of an operation: the same ones each time, or those of a seed."""
    settings = hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @settings
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def given(case: Any) -> None:
        be_brief(case.body, operation.path)
        if mode is GenerationMode.POSITIVE:
            mind_roles(case.body)
        call(case)

    (given if seed is None else hypothesis.seed(seed)(given))()


def be_brief(body: Any, path: str) -> None:
    """Valid requests may ask for more than is worth waiting for here."""
    if isinstance(body, dict):
        for name, most in (("n", 2), *((name, 6) for name in LENGTHS)):
            if type(body.get(name)) in (int, float):  # 3.0 is an integer in JSON
                body[name] = min(body[name], most)
        if path == "/v1/chat/completions" and body.get("max_tokens") is body.get("max_completion_tokens") is None:
            body["max_completion_tokens"] = 6
        if path == "/v1/responses" and body.get("max_output_tokens") is None:
            body["max_output_tokens"] = 6


def mind_roles(body: Any) -> None:
    """What the document cannot say: a choice of tools needs tools, results of tools need calls, a percentile needs a
    target, and what of messages depends on their roles.
    """
    if not isinstance(body, dict):
        return
    if isinstance(targets := body.get("splitfuse_slo"), dict) and targets.get("itl") is None:
        targets.pop("itl_percentile", None)
    for name in OF_MODEL:
        body.pop(name, None)
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        for name in ("tool_call_id", "tool_calls", "refusal"):
            message.pop(name, None)
        if message["role"] == "tool":
            message["role"] = "user"
        role = message["role"]
        if role != "assistant":
            message["content"] = message.get("content") or "Hi"
            for name in ("reasoning", "reasoning_content"):
                message.pop(name, None)
        if role != "system":
            message.pop("clear_at", None)
        if "max_tokens" in body and isinstance(message.get("content"), list) and role in OF_ROLE:
            known = [block for block in message["content"] if block["type"] in OF_ROLE[role]]
            message["content"] = known or "Hi"
