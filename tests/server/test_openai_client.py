"""The unmodified `openai` client: answers equal a pipeline's, and errors are its typed exceptions."""

import asyncio
import math
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai_clients import connect
from running_server import RunningServer, running_server

import splitfuse
from splitfuse.config.server import ServerConfig

MODEL = "storyteller"
PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "user", "content": "Tell me of Anna."}]
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 7, "max_tokens": 40}
LONG: dict[str, Any] = {"max_tokens": 1200, "extra_body": {"ignore_eos": True}}


def expected(pipe: splitfuse.Pipeline, prompt: Any, **keywords: Any) -> list[splitfuse.Response]:
    if "max_tokens" in keywords:
        keywords["max_new_tokens"] = keywords.pop("max_tokens")
    return pipe(prompt, **keywords)


def test_a_completion_equals_a_pipelines(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    answer = ai.completions.create(model=MODEL, prompt=PROMPT, **SAMPLED)
    (alone,) = expected(pipe, PROMPT, **SAMPLED)
    assert answer.choices[0].text == alone.generated_text
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        alone.prompt_length,
        alone.generated_length,
        alone.prompt_length + alone.generated_length,
    )
    assert (answer.object, answer.model) == ("text_completion", MODEL)


def test_a_completion_defaults_to_16_sampled_tokens(ai: openai.OpenAI) -> None:
    answers = [
        ai.completions.create(model=MODEL, prompt=PROMPT, seed=seed, extra_body={"ignore_eos": True})
        for seed in range(6)
    ]
    assert {answer.usage.completion_tokens for answer in answers if answer.usage} == {16}
    assert len({answer.choices[0].text for answer in answers}) > 1


def test_a_chat_equals_a_pipelines(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    answer = ai.chat.completions.create(model=MODEL, messages=MESSAGES, **SAMPLED)
    (alone,) = expected(pipe, [MESSAGES], chat=True, **SAMPLED)
    assert answer.choices[0].message.content == alone.generated_text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage is not None and answer.usage.completion_tokens == alone.generated_length


def test_a_chat_defaults_to_all_remaining_tokens(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


def test_a_conversation_continues_with_returned_messages(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    first = ai.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=20)
    again = {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]}
    second = ai.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, first.choices[0].message, again], temperature=0, max_completion_tokens=30
    )
    said = {"role": "assistant", "content": first.choices[0].message.content}
    conversation = [*MESSAGES, said, {"role": "user", "content": "And\nthen?"}]
    (alone,) = expected(pipe, [conversation], chat=True, max_tokens=30)
    assert second.choices[0].message.content == alone.generated_text


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joins_to_the_whole_with_its_usage(ai: openai.OpenAI, n: int) -> None:
    keywords = {"model": MODEL, "prompt": [PROMPT, "The"], "n": n, **SAMPLED}
    whole = ai.completions.create(**keywords)
    texts, reasons, usages = [""] * 2 * n, [None] * 2 * n, []
    for chunk in ai.completions.create(**keywords, stream=True, stream_options={"include_usage": True}):
        assert chunk.id.startswith("cmpl-")
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert set(usages[:-1]) == {None} and usages[-1] is not None and whole.usage is not None
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usages[-1], count) == getattr(whole.usage, count)


def test_a_streamed_chat_equals_the_whole(ai: openai.OpenAI) -> None:
    keywords = {"model": MODEL, "messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 2, **SAMPLED}
    whole = ai.chat.completions.create(**keywords)
    texts, entries, roles, reasons = ["", ""], [[], []], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in ai.chat.completions.create(**keywords, stream=True):
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += [choice.delta.role] if choice.delta.role else []
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            entries[choice.index] += choice.logprobs.content or [] if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [["assistant"]] * 2
    assert reasons == [[choice.finish_reason] for choice in whole.choices]
    assert entries == [choice.logprobs.content for choice in whole.choices if choice.logprobs]


def test_three_choices_equal_a_pipelines(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    answer = ai.completions.create(model=MODEL, prompt=PROMPT, n=3, best_of=3, **SAMPLED)
    alone = expected(pipe, PROMPT, n=3, **SAMPLED)
    assert [choice.text for choice in answer.choices] == [response.generated_text for response in alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.prompt_tokens == alone[0].prompt_length  # once
    assert answer.usage.completion_tokens == sum(response.generated_length for response in alone)


def test_prompts_are_texts_or_token_ids_one_or_many(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    ids, other = list(pipe.tokenizer.encode(PROMPT)), list(pipe.tokenizer.encode("The"))
    keywords: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 9}
    for one in (PROMPT, ids):
        (choice,) = ai.completions.create(prompt=one, **keywords).choices
        assert choice.text == expected(pipe, PROMPT, max_tokens=9)[0].generated_text
    for many in ([PROMPT, "The"], [ids, other]):
        answer = ai.completions.create(prompt=many, **keywords)
        alone = expected(pipe, [PROMPT, "The"], max_tokens=9)
        assert [c.text for c in answer.choices] == [r.generated_text for r in alone]


def test_stop_strings_and_ids_end_an_answer_and_its_usage(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    keywords = {"temperature": 0, "max_tokens": 60}
    (free,) = expected(pipe, PROMPT, **keywords)
    stop = free.generated_text.strip().split(".")[0][-4:]
    for given in (stop, ["no such thing", stop]):
        answer = ai.completions.create(model=MODEL, prompt=PROMPT, stop=given, **keywords)
        (alone,) = expected(pipe, PROMPT, stop=given, **keywords)
        assert answer.choices[0].text == alone.generated_text == free.generated_text[: free.generated_text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens == alone.generated_length
    answer = ai.completions.create(
        model=MODEL, prompt=PROMPT, extra_body={"stop_token_ids": [free.token_ids[4]]}, **keywords
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == free.token_ids.index(free.token_ids[4]) + 1


def test_every_sampling_parameter_applies(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    common = {"temperature": 1.1, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4, "seed": 3}
    more = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True}
    bias = {266: 3.0, 30: -100.0}
    answer = ai.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=30,
        logit_bias={str(token): value for token, value in bias.items()},  # type: ignore[misc]
        user="someone",
        extra_body={**more, "min_tokens": 5},
        **common,  # type: ignore[call-overload]
    )
    (alone,) = expected(pipe, PROMPT, max_tokens=30, min_new_tokens=5, logit_bias=bias, **common, **more)
    assert answer.choices[0].text == alone.generated_text
    plain = ai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=30, seed=3)
    assert plain.choices[0].text != answer.choices[0].text


# Log-probabilities ---------------------------------------------------------------------------------------------------


def test_logprobs_of_a_completion(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    answer = ai.completions.create(model=MODEL, prompt=PROMPT, logprobs=2, temperature=0, max_tokens=8)
    (alone,) = expected(pipe, PROMPT, logprobs=2, max_tokens=8)
    choice, logprobs = answer.choices[0], answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and alone.logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(8)]
    assert logprobs.token_logprobs == [entry.logprob for entry in alone.logprobs]
    assert logprobs.top_logprobs is not None
    for top, entry in zip(logprobs.top_logprobs, alone.logprobs, strict=True):
        assert sorted(top.values(), reverse=True) == [value for _, value in entry.top]


def test_streamed_logprobs_equal_the_wholes(ai: openai.OpenAI) -> None:
    text = ai.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=30).choices[0].text
    for stop in (text[10:14], text[20:27], text[11:23], "never to be seen", text[3] + "!"):
        keywords = {"model": MODEL, "prompt": PROMPT, "logprobs": 1, "temperature": 0, "max_tokens": 30, "stop": stop}
        whole = ai.completions.create(**keywords).choices[0].logprobs
        pieces = [
            choice.logprobs
            for chunk in ai.completions.create(**keywords, stream=True)
            for choice in chunk.choices
            if choice.logprobs is not None
        ]
        for column in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [item for piece in pieces for item in getattr(piece, column)] == getattr(whole, column)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(
    ai: openai.OpenAI, pipe: splitfuse.Pipeline, max_tokens: int, stream: bool
) -> None:
    keywords = {"model": MODEL, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens}
    ids = pipe.tokenizer.encode(PROMPT)
    (alone,) = expected(pipe, PROMPT, max_tokens=max(max_tokens, 1), logprobs=1, prompt_logprobs=1)
    assert alone.prompt_logprobs is not None and alone.logprobs is not None
    for prompt in (PROMPT, list(ids)):
        if stream:
            options = {"include_usage": True}
            chunks = list(ai.completions.create(prompt=prompt, stream=True, stream_options=options, **keywords))
            choices, usage = [c for chunk in chunks for c in chunk.choices], chunks[-1].usage
        else:
            answer = ai.completions.create(prompt=prompt, **keywords)
            choices, usage = answer.choices, answer.usage
        text = "".join(choice.text for choice in choices)
        assert text == PROMPT + (alone.generated_text if max_tokens else "")
        values = [value for choice in choices for value in choice.logprobs.token_logprobs]
        tokens = [value for choice in choices for value in choice.logprobs.tokens]
        offsets = [value for choice in choices for value in choice.logprobs.text_offset]
        generated = [entry.logprob for entry in alone.logprobs] if max_tokens else []
        assert values == [None, *(entry.logprob for entry in alone.prompt_logprobs), *generated]
        assert "".join(tokens[1:]) == text  # the first is the begin token
        assert [text[offset:].startswith(token) for offset, token in zip(offsets[1:], tokens[1:], strict=True)]
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), max_tokens)


def test_requests_of_lm_eval(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    texts = ["The river ran", "Anna keeps bees."]
    ids = [list(pipe.tokenizer.encode(text)) for text in texts]
    answer = ai.completions.create(
        model=MODEL, prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for choice, prompt in zip(answer.choices, ids, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        (alone,) = expected(pipe, [prompt], max_tokens=1, prompt_logprobs=1)
        scored = choice.logprobs.token_logprobs[1:-1]  # of the prompt
        assert alone.prompt_logprobs is not None
        assert math.isclose(sum(scored), sum(entry.logprob for entry in alone.prompt_logprobs))  # type: ignore[arg-type]
        tops = choice.logprobs.top_logprobs
        assert tops is not None and len(tops) == len(prompt) + 1
        for value, top in zip(scored, tops[1:-1], strict=True):
            assert max(top.values()) >= value


def test_token_bytes_of_a_chat_join_to_its_text(ai: openai.OpenAI, pipe: splitfuse.Pipeline) -> None:
    broken = next(i for i in range(6, 300) if "\ufffd" in pipe.tokenizer.decode([i]))  # half a character
    answer = ai.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=3,
        max_tokens=12,
        temperature=0,
        seed=1,
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content if entry.token != "<|end|>")
    assert data.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob
    forced = ai.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, max_tokens=1, temperature=0, logit_bias={str(broken): 100}
    )
    logprobs = forced.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    (entry,) = logprobs.content
    assert entry.bytes is not None and entry.token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
    assert bytes(entry.bytes).decode(errors="replace") == "\ufffd" == forced.choices[0].message.content


# Many at once --------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_same_among_32_others(server: RunningServer, pipe: splitfuse.Pipeline) -> None:
    prompts = [f"{PROMPT}, {name} had {i} apples." for i, name in enumerate(["Anna", "Ben", "Clara", "Dan"] * 8)]

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        keywords = {"model": MODEL, "prompt": prompts[index], "temperature": 1.0, "seed": index, "max_tokens": 24}
        if index % 2:
            return (await client.completions.create(**keywords)).choices[0].text
        stream = await client.completions.create(**keywords, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, index) for index in range(len(prompts))))

    alone = [
        expected(pipe, prompt, temperature=1.0, seed=index, max_tokens=24)[0].generated_text
        for index, prompt in enumerate(prompts)
    ]
    assert asyncio.run(ask_all()) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_an_asynchronous_call_ends_its_request(server: RunningServer, stream: bool) -> None:
    async def ask_and_go() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask() -> None:
                answer = await client.completions.create(model=MODEL, prompt=PROMPT, stream=stream, n=4, **LONG)
                async for _ in answer:
                    pass

            call = asyncio.create_task(ask())
            await asyncio.to_thread(server.wait_until_running, 4)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    with server.held(server.nothing_runs):
        asyncio.run(ask_and_go())
        server.assert_idle()
    assert server.wait_for_record(status=499)["finish_reasons"] == {"abort": 4}


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature"),
        ({"n": 0}, "n", "n must be a whole number"),
        ({"n": 1000}, "n", "n must be a whole number"),
        ({"max_tokens": 2048}, "max_tokens", "max_tokens can be at most 2037"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens must be a whole number or null, not a string"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token id 99999"),
        ({"stop": ["a"] * 65}, "stop", "stop"),
        ({"stop": ["a" * 1000] * 9}, "stop", "stop has 9000 characters in all"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options need stream: true"),
        ({"best_of": 3}, "best_of", "best_of 3 is not supported"),
        ({"suffix": "end"}, "suffix", 'suffix "end" is not supported'),
        ({"logprobs": 129}, "logprobs", "logprobs"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean 'temperature'?"),
        ({"extra_body": {"min_tokens": 30}}, "min_tokens", "min_tokens must be at most max_tokens"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [""]}, "prompt", "the prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1]: the prompt is empty"),
        ({"prompt": [[1], [9999]]}, "prompt[1]", "prompt[1]: prompt has the token id 9999"),
        ({"prompt": ["a", [1]]}, "prompt", "not a mixture"),
        ({"prompt": [5000]}, "prompt", "token id 5000"),
        ({"prompt": ["a"] * 257}, "prompt", "at most 256"),
    ],
)
def test_a_bad_request_names_its_parameter(ai: openai.OpenAI, keywords: Any, param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ai.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 16, **keywords})
    assert refusal.value.param == param
    assert message in refusal.value.message
    assert refusal.value.type == "invalid_request_error" and refusal.value.code


@pytest.mark.parametrize(
    ("keywords", "param"),
    [
        ({"functions": [{"name": "f", "parameters": {}}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_completion_tokens": 2047}, "max_completion_tokens"),
        ({"max_tokens": 2047}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "the " * 3000}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "4", "tool_call_id": "x"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ],
)
def test_an_invalid_chat_names_its_parameter(ai: openai.OpenAI, keywords: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ai.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **keywords})
    assert refusal.value.param == param


def test_neutral_values_are_accepted(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=3,
        temperature=None,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        service_tier="auto",
        metadata=None,
    )
    assert answer.choices[0].message.content


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    names: list[Literal["Tom", "Rex"]] = pydantic.Field(min_length=1, max_length=2)
    home: "Animal | None"


def test_answers_are_parsed_into_classes(ai: openai.OpenAI) -> None:
    sampled: dict[str, Any] = {**SAMPLED, "max_tokens": 400}
    answer = ai.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Animal, **sampled)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Animal) and parsed.names and answer.choices[0].finish_reason == "stop"
    with ai.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Animal, **sampled) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_another_model_is_not_found(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no model 'gpt-9' here; this server has 'storyteller'") as refusal:
        ai.completions.create(model="gpt-9", prompt=PROMPT)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-9")
    assert [model.id for model in ai.models.list()] == [MODEL]
    assert ai.models.retrieve(MODEL).id == MODEL


def test_a_too_long_prompt_is_refused(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the model takes at most 2047") as refusal:
        ai.completions.create(model=MODEL, prompt=[7] * 2048)
    assert refusal.value.code == "context_length_exceeded"


def test_a_full_server_answers_429_and_retries_get_through() -> None:
    with (
        running_server(ServerConfig(max_queued_requests=1)) as server,
        connect(server) as hasty,
        connect(server, max_retries=50) as patient,
        server.held(lambda: sum(record["status"] == 429 for record in server.records) >= 4),
    ):
        stream = hasty.completions.create(model=MODEL, prompt=PROMPT, stream=True, **{**LONG, "max_tokens": 100})
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="the server is at capacity") as refusal:
            hasty.completions.create(model=MODEL, prompt=PROMPT)
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        with server.http() as http:
            for path, body in (("/tokenize", {"prompt": PROMPT}), ("/detokenize", {"tokens": [5]})):
                assert http.post(path, json=body).status_code == 429
        with pytest.raises(openai.BadRequestError, match="n x prompts = 2 requests"):
            hasty.completions.create(model=MODEL, prompt=PROMPT, n=2)
        raw = patient.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=2)
        assert raw.retries_taken >= 1
        assert raw.parse().choices[0].text
        stream.close()
        server.assert_idle()


def test_keys_are_required_and_separate_caches(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-two\n\n sk-three \n")
    file.chmod(0o600)
    config = ServerConfig(api_key=("sk-one",), api_key_file=str(file))
    long = {"model": MODEL, "prompt": PROMPT * 30, "max_tokens": 1}
    with running_server(config) as server:
        for key in ("wrong", "sk-on", "sk-one!", "none"):
            with connect(server, api_key=key) as client, pytest.raises(openai.AuthenticationError) as refusal:
                client.models.list()
            assert refusal.value.code == "invalid_api_key" and key not in refusal.value.message
        cached = []
        for key in ("sk-one", "sk-two", "sk-one", "sk-three"):
            with connect(server, api_key=key) as client:
                usage = client.completions.create(**long).usage  # type: ignore[call-overload]
                cached.append(usage.prompt_tokens_details.cached_tokens)
        assert cached[:2] == [0, 0] and cached[2] > 200 and cached[3] == 0
        server.wait_for_record(key="key 3")
        names = [record["key"] for record in server.records if record["status"] == 200]
        assert names == ["key 1", "key 2", "key 1", "key 3"]
        assert "sk-" not in server.log.getvalue()
