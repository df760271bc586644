"""Answers of a form in the engine: the same tokens preempted and in broken steps, and ends that are clear."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from draft_models import count_drafts, draft_always
from forced_preemption import break_steps, force_preemptions
from guessed_drafts import guess_answers
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import DraftKind
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.sampling.grammar import MAX_KEPT, Grammars
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.responses import Response

FORMS: tuple[dict[str, Any], ...] = (
    {"json": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 4, "maxItems": 9}},
    {"regex": "([a-d]{2} ){3,6}!"},
    {"grammar": 'root ::= "(" root ")" | "x" | "y" root'},
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.5, "seed": 1, "n": 3},
    {"temperature": 1.0, "top_k": 5, "seed": 2, "repetition_penalty": 1.3, "min_new_tokens": 4},
    {"stop": ["!", "b"], "logprobs": 1},
)


@pytest.fixture
def pipe() -> Iterator[splitfuse.Pipeline]:
    """An engine of its own: tests change how it works."""
    yield splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64)


def prepare(pipe: splitfuse.Pipeline) -> list[Any]:
    return [
        request
        for form in (*FORMS, None)
        for settings in SETTINGS
        for request in pipe.prepare(
            f"Once upon a time {len(settings)}", max_new_tokens=14, structured_outputs=form, **settings
        )
    ]


def answers(pipe: splitfuse.Pipeline, requests: list[Any]) -> list[tuple[object, ...]]:
    responses = [piece.response for piece in pipe.run(requests) if piece.response is not None]
    check_scheduler(pipe.engine.scheduler)
    return [outcome(response) for response in sorted(responses, key=lambda each: (each.index, each.choice))]


def outcome(response: Response) -> tuple[object, ...]:
    return response.token_ids, response.generated_text, response.finish_reason, response.error


def test_tokens_are_equal_alone_and_preempted(pipe: splitfuse.Pipeline) -> None:
    requests = prepare(pipe)
    alone = [answer for request in requests for answer in answers(pipe, [request])]
    assert all(error is None for *_, error in alone)
    force_preemptions(pipe.engine)
    assert answers(pipe, requests) == alone


def test_tokens_are_equal_if_steps_are_planned_ahead(pipe: splitfuse.Pipeline) -> None:
    requests = prepare(pipe)
    one_by_one = answers(pipe, requests)
    pipe.engine.executor.keeps_plans = True
    assert answers(pipe, requests) == one_by_one
    force_preemptions(pipe.engine)
    assert answers(pipe, requests) == one_by_one


def test_drafts_change_no_answer_of_a_form(pipe: splitfuse.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = prepare(pipe)
    wanted = answers(pipe, requests)
    drafting = guess_answers(pipe.engine, requests, [tokens for tokens, *_ in wanted])  # type: ignore[misc]
    assert answers(pipe, requests) == wanted
    assert drafting.accepted > 50
    break_steps(monkeypatch)
    assert answers(pipe, requests) == wanted


def test_a_draft_model_changes_no_answer_of_a_form(pipe: splitfuse.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = prepare(pipe)
    wanted = answers(pipe, requests)
    settings = {"num_speculative_tokens": 4, "draft_model": str(BUNDLED_MODEL)}
    other = splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64, **settings)
    draft_always(other.engine)
    counts = count_drafts(other.engine)
    assert answers(other, prepare(other)) == wanted
    drafted, accepted = counts[DraftKind.MODEL]
    assert counts[DraftKind.FORM][0] > 0 and 0.9 * drafted < accepted and drafted > 50
    break_steps(monkeypatch)
    assert answers(other, prepare(other)) == wanted


def test_tokens_that_a_form_forces_are_drafted(pipe: splitfuse.Pipeline) -> None:
    schema = {"properties": {"a name": {"enum": ["b"]}}, "required": ["a name"], "additionalProperties": False}
    form = {"json": {"type": "object", **schema}, "disable_any_whitespace": True}
    (request,) = pipe.prepare("Once", max_new_tokens=40, structured_outputs=form)
    (wanted,) = answers(pipe, [request])
    pipe.engine.scheduler.drafting = Drafting(most=16)
    assert isinstance(pipe.engine.executor, Executor)
    pipe.engine.executor.num_forced = 16
    steps: list[StepRecord] = []
    pipe.engine.events.subscribe(StepRecord, steps.append)
    assert answers(pipe, [request]) == [wanted]
    assert len(wanted[0]) > 10 and len(steps) == 2  # type: ignore[arg-type]


def test_a_step_that_fails_advances_no_grammar(pipe: splitfuse.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = prepare(pipe)
    wanted = answers(pipe, requests)
    break_steps(monkeypatch)
    assert answers(pipe, requests) == wanted


def test_a_grammar_that_outgrows_the_parser_ends_its_request_alone(pipe: splitfuse.Pipeline) -> None:
    rules = "".join(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}\n" for i in range(30))
    ambiguous = StructuredOutputs("grammar", "r", compiled=lark(f'start: r0\n{rules}r30: "a"+ |'))
    free, other = pipe.prepare(["a", "b"], max_new_tokens=60, ignore_eos=True)
    hostile = PreparedRequest(free.token_ids, replace(free.params, structured_outputs=ambiguous))
    results = {piece.index: piece.response for piece in pipe.run([hostile, other]) if piece.response is not None}
    assert results[0] is not None and "cannot be enforced any further" in (results[0].error or "")
    assert results[1] is not None and results[1].generated_length == 60


def test_a_grammar_with_a_dead_end_says_so(pipe: splitfuse.Pipeline) -> None:
    form = {"grammar": "start: /a{40}/ B\nB: /b/ & /c/"}
    (request,) = pipe.prepare("a", max_new_tokens=60, structured_outputs=form)
    ((_, _, _, error),) = answers(pipe, [request])
    assert "nothing may follow" in str(error)


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def test_a_tokenizer_that_cannot_be_used_fails_the_request(
    pipe: splitfuse.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.engine.model.grammars, "_read_tokenizer", lambda: "{}")
    (constrained,) = pipe.prepare("a", structured_outputs={"regex": "a+"}, max_new_tokens=3)
    (free,) = pipe.prepare("a", max_new_tokens=3)
    results = {piece.index: piece.response for piece in pipe.run([constrained, free]) if piece.response is not None}
    assert results[0] is not None and "this model's tokenizer" in (results[0].error or "")
    assert results[1] is not None and results[1].error is None


def test_a_held_request_can_be_given_up(pipe: splitfuse.Pipeline) -> None:
    (request,) = pipe.prepare("a", structured_outputs={"regex": "[b-d]{40}"}, max_new_tokens=30)
    pieces = pipe.run([request])
    pieces.close()
    assert not pipe.engine.has_unfinished
    assert isinstance(pipe("a", structured_outputs={"choice": ["z"]})[0].generated_text, str)


def test_no_step_makes_the_grammar_of_an_accepted_request(
    pipe: splitfuse.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, grammars, opened = pipe.engine, pipe.engine.model.grammars, threading.Event()
    make = Grammars._make
    first, second = pipe.prepare(["a", "b"], max_new_tokens=12, structured_outputs={"regex": "[c-e]{20}"})
    grammars.prepare(StructuredOutputs.of(first.params.structured_outputs)).result()  # so both are accepted at once
    engine.add_request("first", first.token_ids, first.params)
    engine.add_request("second", second.token_ids, second.params)

    def slowly(self: Grammars, compiled: str) -> Any:
        opened.wait()
        return make(self, compiled)

    monkeypatch.setattr(Grammars, "_make", slowly)
    others = [f"other {index}" for index in range(MAX_KEPT + 1)]
    for name in others:
        params = replace(first.params, structured_outputs=StructuredOutputs("regex", "", compiled=lark(name)))
        engine.add_request(name, first.token_ids, params)
    force_preemptions(engine)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(grammars._thread, "submit", lambda *_: pytest.fail("a step makes a grammar"))
            while engine.is_unfinished("first") or engine.is_unfinished("second"):
                engine.step()
        assert engine.num_pending == len(others) and not engine._matchers
        assert all(engine.abort(name) for name in others)
    finally:
        opened.set()


def test_a_form_must_be_compiled_before_the_engine_gets_it(pipe: splitfuse.Pipeline) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs.of({"regex": "a"}))
    with pytest.raises(splitfuse.InvalidRequestError, match="compile it first"):
        pipe.engine.add_request("a", [1], params)


def test_a_form_is_one_of_those_known() -> None:
    form = StructuredOutputs.of({"json": {"type": "string"}, "disable_any_whitespace": True})
    assert StructuredOutputs.of(form.as_dict()) == form and StructuredOutputs.of(form) is form
    choice = StructuredOutputs.of({"choice": ("a", "b")})
    assert choice.as_dict() == {"choice": ["a", "b"]} and isinstance(choice, StructuredOutputs)
    for wrong in ("a+", {"regex": 3}, {"choice": "ab"}, {"choice": []}, {"json": 3}, {"json_object": "yes"}):
        with pytest.raises(splitfuse.InvalidRequestError, match="structured_outputs"):
            StructuredOutputs.of(wrong)
    with pytest.raises(splitfuse.InvalidRequestError, match="needs json"):
        StructuredOutputs.of({"regex": "a", "disable_any_whitespace": True})
