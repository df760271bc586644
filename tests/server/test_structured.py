"""Answers of a form: each form by each name on each route, streamed and not, and forms that are refused."""

import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hostile_forms import HOSTILE, schema
from patience import PATIENCE
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.text.chat_options import ChatOptions

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" " " ("really" | "perhaps")'
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: Mapping[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Once upon a time"},
    CHAT: {"messages": [{"role": "user", "content": "Tell me a story"}]},
}


def is_person(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "kind"] and len(value["name"]) <= 12
    return type(value["age"]) is int and 0 <= value["age"] <= 120 and value["kind"] in ("cat", "dog", None)


def is_compact(text: str) -> bool:
    return is_person(text) and json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text


def matches(pattern: str) -> Any:
    return re.compile(pattern).fullmatch


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON, "strict": True}}},
        is_person,
    ),
    "structured_outputs.json": (
        {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
        is_compact,
    ),
    "guided_json": ({"guided_json": json.dumps(PERSON)}, is_person),
    "regex": ({"structured_outputs": {"regex": "[a-c]{3,5}!"}}, matches("[a-c]{3,5}!")),
    "guided_regex": ({"guided_regex": "(ab)+c"}, matches("(ab)+c")),
    "choice": ({"structured_outputs": {"choice": ["red", 'a "b"\n', "grün"]}}, ["red", 'a "b"\n', "grün"].__contains__),
    "guided_choice": ({"guided_choice": ["left", "right"]}, ["left", "right"].__contains__),
    "gbnf": ({"structured_outputs": {"grammar": GBNF}}, matches("yes|no (really|perhaps)")),
    "lark": ({"guided_grammar": 'start: "a" start "b" | "c"'}, matches("a*cb*")),
}


def body(route: str, form: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {**PROMPTS[route], "max_tokens": 200, "seed": 7, **form, **others}


def texts(answer: Mapping[str, Any]) -> list[str]:
    choices = answer["choices"]
    assert all(choice["finish_reason"] == "stop" for choice in choices), choices
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def streamed(http: httpx.Client, route: str, sent: dict[str, Any]) -> str:
    text = ""
    with http.stream("POST", route, json={**sent, "stream": True}) as response:
        for line in filter(None, response.iter_lines()):
            if line != "data: [DONE]":
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", FORMS)
def test_answers_have_the_form_streamed_and_whole(server: RunningServer, name: str, route: str) -> None:
    form, fits = FORMS[name]
    with server.http() as http:
        sent = body(route, form)
        whole = http.post(route, json=sent)
        assert whole.status_code == 200, whole.text
        (text,) = texts(whole.json())
        assert fits(text), text
        assert streamed(http, route, sent) == text


def test_any_object_is_json(server: RunningServer) -> None:
    with server.http() as http:
        form = {"response_format": {"type": "json_object"}, "n": 4, "max_tokens": 200}
        answer = http.post(COMPLETIONS, json=body(COMPLETIONS, form)).json()
    ended = [choice["text"] for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert all(choice["text"].startswith("{") for choice in answer["choices"])


def test_answers_are_equal_alone_and_in_company(server: RunningServer) -> None:
    settings: tuple[dict[str, Any], ...] = (
        {"temperature": 0, "logprobs": 1},
        {"temperature": 1.3, "frequency_penalty": 0.5, "min_tokens": 3},
        {"temperature": 0.8, "top_p": 0.9, "n": 2},
    )
    forms = [*(FORMS[name][0] for name in ("structured_outputs.json", "regex", "choice", "lark")), {}]
    sent = [body(COMPLETIONS, {**form, **each}, max_tokens=30) for form in forms for each in settings]
    with server.http() as http, ThreadPoolExecutor(len(sent)) as pool:

        def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
            response = http.post(COMPLETIONS, json=request)
            assert response.status_code == 200, response.text
            return list(response.json()["choices"])

        alone = [answer(request) for request in sent]
        assert list(pool.map(answer, sent)) == alone


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": (schema(properties={"age": {"foo": 3}}), "structured_outputs.json", "'foo' at #/properties/age"),
    "not": (schema(items={"not": {}}), "structured_outputs.json", "'not' at #/items"),
    "format": (schema(type="string", format="iri-reference"), "structured_outputs.json", "iri-reference"),
    "overlap": (schema(oneOf=[{"type": "integer"}, {"type": "number"}]), "structured_outputs.json", "'oneOf'"),
    "options": (schema(**{"x-guidance": {"lenient": True}}), "structured_outputs.json", "x-guidance"),
    "reference outside": (schema(**{"$ref": "https://example.com/x.json"}), "structured_outputs.json", "$ref"),
    "reference to what is no schema": (
        schema(**{"$ref": "#/examples/0", "examples": [{"foo": 1}]}),
        "structured_outputs.json",
        '"#/examples/0"',
    ),
    "unsatisfiable": (schema(type="string", minLength=5, maxLength=2), "structured_outputs.json", "minLength"),
    "constant that would be rounded": (schema(const=[{"a": 2**53 + 1}]), "structured_outputs.json", "9007199254740993"),
    "bound that would be rounded": (schema(minimum=2**53 + 1), "structured_outputs.json", "'minimum' at #"),
    "bounds of more than 64 bits": (
        schema(type="integer", minimum=10**30, maximum=10**30 + 5),
        "structured_outputs.json",
        "'minimum' at #",
    ),
    "maximum of more than 64 bits": (
        schema(items={"type": "integer", "maximum": -(2**63) - 5}),
        "structured_outputs.json",
        "'maximum' at #/items",
    ),
    "range after a whole number": (
        schema(type="number", exclusiveMinimum=0, maximum=0.5),
        "structured_outputs.json",
        "use 'minimum'",
    ),
    "range before a whole number": (
        schema(items={"type": "number", "maximum": 0, "exclusiveMaximum": True, "minimum": -0.5}),
        "structured_outputs.json",
        "use 'maximum'",
    ),
    "endless": (
        schema(**{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        "structured_outputs.json",
        "allows no answer",
    ),
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"foo": 1}}}},
        "response_format.json_schema.schema",
        "'foo' at #",
    ),
    "guided_json": ({"guided_json": {"foo": 1}}, "guided_json", "guided_json has the key 'foo'"),
    "json that is none": ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    "regex": ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
    "look-ahead": ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    "nothing": ({"guided_regex": r"[^\s\S]"}, "guided_regex", "allows no answer"),
    "grammar": ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", '"foo"'),
    "schema in a grammar": ({"guided_grammar": 'start: %json {"foo": 1}'}, "guided_grammar", "%json"),
    "json in place of a grammar": ({"guided_grammar": '{"grammars": []}'}, "guided_grammar", "neither"),
    "several": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "give one"),
    "several in one": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "together"),
    "none": ({"structured_outputs": {}}, "structured_outputs", "none of them"),
    "unknown form": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unknown"),
    "tag": ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag", "not supported"),
    "type": ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
}
SLOW = "products of patterns", "repetition", "many properties"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_a_400_that_names_it(server: RunningServer, name: str) -> None:
    form, parameter, words = REFUSED[name]
    with server.http() as http:
        response = http.post(CHAT, json=body(CHAT, form))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == parameter and words in error["message"], error


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in HOSTILE])
def test_a_hostile_form_is_refused_and_others_go_on(server: RunningServer, name: str) -> None:
    with server.http() as http, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(streamed, http, COMPLETIONS, body(COMPLETIONS, {}, max_tokens=100, ignore_eos=True))
        response = http.post(COMPLETIONS, json=body(COMPLETIONS, HOSTILE[name]))
        assert response.status_code == 400, response.text
        assert stream.result(PATIENCE)
        assert texts(http.post(COMPLETIONS, json=body(COMPLETIONS, {"guided_choice": ["a"]})).json()) == ["a"]


def test_forms_that_look_hostile_are_answered(server: RunningServer) -> None:
    for form in (
        schema(type="array", items={"enum": [1]}, minItems=1, maxItems=10**9),
        schema(type="string", maxLength=10**9),
        {"guided_regex": "(a+)+b"},
        {"guided_regex": "(a|b)*a(a|b){30}"},
        {"guided_choice": [f"choice {i}" for i in range(3000)]},
        {"guided_choice": ["\x7f\x80\x85\u2028\U0001f600"]},
        schema(type="integer", minimum=0, maximum=2**63 - 1),
        schema(type="integer", minimum=2**53, maximum=2**64 - 1),
        schema(type="number", exclusiveMinimum=0, exclusiveMaximum=1),
        schema(type="number", minimum=0, exclusiveMinimum=False, exclusiveMaximum=0.5),
        schema(enum=[2**53, 2**60, 1e16, 0.1, True]),
    ):
        with server.http() as http:
            response = http.post(COMPLETIONS, json=body(COMPLETIONS, form, max_tokens=8))
        assert response.status_code == 200, response.text


def test_the_form_ends_the_answer(server: RunningServer) -> None:
    with server.http() as http:

        def answer(**fields: Any) -> dict[str, Any]:
            response = http.post(COMPLETIONS, json=body(COMPLETIONS, fields))
            assert response.status_code == 200, response.text
            choice: dict[str, Any] = response.json()["choices"][0]
            return choice

        assert answer(guided_choice=["yes"], min_tokens=50, ignore_eos=True)["finish_reason"] == "stop"
        longer = answer(guided_regex="a+", min_tokens=30, max_tokens=40, temperature=0)
        assert len(longer["text"]) >= 30 and set(longer["text"]) == {"a"}
        endless = answer(guided_regex="a+", ignore_eos=True, max_tokens=40)
        assert endless["finish_reason"] == "length" and len(endless["text"]) == 40
        cut = answer(guided_regex="ab+c", stop=["b"])
        assert (cut["text"], cut["finish_reason"]) == ("a", "stop")
        banned = answer(guided_regex="a", logit_bias={str(token): -100 for token in range(1, 200)})
        assert banned["text"] == "a"


def test_logprobs_are_those_of_the_model(server: RunningServer) -> None:
    sent = body(COMPLETIONS, {"guided_choice": ["zebra"]}, logprobs=2, temperature=0)
    with server.http() as http:
        choice = http.post(COMPLETIONS, json=sent).json()["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "zebra"
    assert max(choice["logprobs"]["token_logprobs"]) < 0
    assert all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"])


def test_a_client_gets_what_a_pipeline_gives(server: RunningServer, pipe: splitfuse.Pipeline) -> None:
    keywords: dict[str, Any] = {
        "max_new_tokens": 120,
        "structured_outputs": {"json": PERSON, "disable_any_whitespace": True},
        "temperature": 1.0,
        "seed": 3,
    }
    with splitfuse.client(server.url) as client:
        for chat in (False, True):
            (remote,) = client("Once upon a time", chat=chat, **keywords)
            (local,) = pipe("Once upon a time", chat=chat, **keywords)
            assert is_person(local.generated_text) and remote.generated_text == local.generated_text
        with pytest.raises(splitfuse.InvalidRequestError, match="'foo' at #"):
            client("x", structured_outputs={"json": {"foo": 1}})
        with pytest.raises(splitfuse.InvalidRequestError, match="did you mean 'regex'"):
            client("x", structured_outputs={"regexp": "a"})


def test_a_tokenizer_that_cannot_be_used_is_a_400(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = server.engine.model.grammars
    monkeypatch.setattr(grammars, "_tokenizer", None, raising=False)
    monkeypatch.delattr(grammars, "_tokenizer")  # as if it had not been prepared
    monkeypatch.setattr(grammars, "_read_tokenizer", lambda: "{}")
    with server.http() as http:
        response = http.post(CHAT, json=body(CHAT, {"guided_regex": "of no other test"}))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "guided_regex" and "this model's tokenizer" in error["message"]


def test_a_grammar_that_is_made_holds_up_no_other_request(server: RunningServer) -> None:
    """Many properties take a while to compile; requests without a form are answered meanwhile, in whatever order."""
    slow = {f"p{i}": {"type": "string"} for i in range(400)}
    with ThreadPoolExecutor(4) as pool, server.http() as http:
        form = schema(type="object", properties=slow, required=list(slow))
        slowly = pool.submit(http.post, COMPLETIONS, json=body(COMPLETIONS, form, max_tokens=4))
        others = [pool.submit(http.post, COMPLETIONS, json=body(COMPLETIONS, {}, max_tokens=4)) for _ in range(4)]
        assert all(each.result(PATIENCE).status_code == 200 for each in (slowly, *others))


def test_forms_of_a_key_hold_up_no_form_of_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def ask(key: str) -> int:
        with server.http(headers={"authorization": f"Bearer {key}"}) as http:
            return http.post(COMPLETIONS, json=body(COMPLETIONS, {"guided_choice": [key]}, max_tokens=4)).status_code

    with running_server(ServerConfig(api_key=["one", "two"])) as server, ThreadPoolExecutor(3) as pool:
        for encoder in server.service._grammars.encoders:
            compile_now = encoder.compile

            def compiled(params: SamplingParams, options: ChatOptions, compile_now: Any = compile_now) -> Any:
                form = params.structured_outputs
                assert form is not None and (form.source != '["one"]' or go_on.wait(PATIENCE))
                return compile_now(params, options)

            monkeypatch.setattr(encoder, "compile", compiled)
        slow = [pool.submit(ask, "one") for _ in range(3)]
        server.wait_until(lambda: server.admission.num_requests == 3)
        assert ask("two") == 200 and not any(each.done() for each in slow)
        go_on.set()
        assert [each.result(PATIENCE) for each in slow] == [200] * 3
