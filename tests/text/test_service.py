"""Text over an EngineClient: what is read is what `pipeline` gives, and a reader that stops leaves nothing behind."""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing
from typing import Any, cast

import pytest
import tiny_tokenizers
from patience import PATIENCE

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, PromptTooLongError, TokenizerError
from splitfuse.models.sources.hub import open_model
from splitfuse.text.aiter import merged
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.service import CLIENT, Pause, TextService
from splitfuse.text.token_text import TokenPieces
from splitfuse.text.tokenizer import Tokenizer

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline()


def with_service(work: Callable[[TextService], Awaitable[Any]]) -> Any:
    """Do `work` with a service, which must be empty afterwards."""

    async def run() -> Any:
        engine = Engine.load(EngineConfig.from_settings({"max_num_batched_tokens": 256}))
        client = AsyncEngine(engine)
        await client.start()
        try:
            with closing(TextService(client, Tokenizer.from_source(open_model(None)))) as service:
                result = await asyncio.wait_for(work(service), PATIENCE)
            await wait_until_empty(client, engine)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result
        finally:
            await client.close()

    return asyncio.run(run())


async def wait_until_empty(client: AsyncEngine, engine: Engine) -> None:
    async with asyncio.timeout(PATIENCE):
        while engine.has_unfinished or engine.allocator.num_held or client.outstanding_tokens:
            await asyncio.sleep(0.002)


async def read(service: TextService, request: PreparedRequest) -> dict[int, tuple[str, Generation]]:
    """Of each choice the text of all pieces, and the generation."""
    texts: dict[int, tuple[str, Generation]] = {}

    def take(generation: Generation, text: str) -> None:
        texts[generation.choice] = (texts.get(generation.choice, ("",))[0] + text, generation)

    await service.run(service.begin([request], request_id="r"), take)
    return texts


@pytest.mark.parametrize("stop", [(), ("the", "no such thing")])
def test_a_generation_equals_that_of_pipeline(pipe: splitfuse.Pipeline, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.2, seed=5, n=3, stop=stop, logprobs=1, prompt_logprobs=0)

    async def work(service: TextService) -> None:
        answers = await read(service, await service.encode(PROMPT, params))
        alone = pipe(PROMPT, max_new_tokens=40, temperature=1.2, seed=5, n=3, stop=stop, logprobs=1, prompt_logprobs=0)
        for response in alone:
            text, generation = answers[response.choice]
            assert text == generation.text == response.generated_text
            assert tuple(generation.token_ids) == response.token_ids
            assert tuple(generation.logprobs) == response.logprobs
            assert tuple(generation.prompt_logprobs) == response.prompt_logprobs
            assert (generation.finish_reason, generation.stop_string) == (response.finish_reason, response.stop_string)
            assert generation.num_steps >= len(generation.token_ids)
            assert generation.first_step is not None and generation.first_step <= generation.timings.tokens[0]

    with_service(work)


def test_a_chat_equals_that_of_pipeline(pipe: splitfuse.Pipeline) -> None:
    messages = [{"role": "user", "content": "Tell me of Anna."}]

    async def work(service: TextService) -> None:
        prompt = await service.encode_chat(messages, SamplingParams(max_tokens=20))
        answers = await read(service, prompt)
        (alone,) = pipe([messages], chat=True, max_new_tokens=20)
        assert answers[0][0] == alone.generated_text and len(prompt.token_ids) == alone.prompt_length

    with_service(work)


def test_a_prompt_in_several_steps_counts_them() -> None:
    async def work(service: TextService) -> None:
        limit = service.client.info.max_num_batched_tokens
        length = 2 * limit + 5
        answers = await read(service, PreparedRequest((7,) * length, SamplingParams(max_tokens=3)))
        (_, generation) = answers[0]
        assert generation.num_steps == 3 + 2 and generation.first_step is not None
        assert generation.first_step < generation.timings.tokens[0]

    with_service(work)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("pauses", [False, True])
def test_cancelling_aborts_every_choice(n: int, pauses: bool) -> None:
    async def work(service: TextService) -> None:
        params = SamplingParams(max_tokens=1900, ignore_eos=True, n=n, temperature=1.0)
        generations = service.begin([await service.encode(PROMPT, params)], request_id="r")
        started = asyncio.Event()

        async def pause() -> None:
            started.set()
            await asyncio.sleep(PATIENCE)

        def take(_: Generation, __: str) -> Pause | None:
            if pauses:
                return pause
            started.set()
            return None

        task = asyncio.create_task(service.run(generations, take))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {generation.finish_reason for generation in generations} == {FinishReason.ABORT}

    with_service(work)


def test_an_error_of_the_reader_ends_the_others() -> None:
    async def work(service: TextService) -> None:
        params = SamplingParams(max_tokens=1900, ignore_eos=True, n=2)
        generations = service.begin([await service.encode(PROMPT, params)], request_id="r")

        def take(generation: Generation, _: str) -> None:
            if generation.choice == 1:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await service.run(generations, take)
        assert {generation.finish_reason for generation in generations} == {FinishReason.ABORT}

    with_service(work)


def test_a_refused_choice_ends_the_others() -> None:
    async def work(service: TextService) -> None:
        params = SamplingParams(max_tokens=1900, ignore_eos=True)
        good, bad = PreparedRequest((7,) * 10, params), PreparedRequest((7,) * 3000, params)
        with pytest.raises(InvalidRequestError):
            bad.check(service.client.info.limits)
        generations = service.begin([good, bad], request_id="r")
        with pytest.raises(InvalidRequestError, match="the prompt has 3000 tokens"):
            await service.run(generations, lambda _generation, _text: None)

    with_service(work)


def test_closing_the_engine_ends_all_generations() -> None:
    async def work(service: TextService) -> None:
        params = SamplingParams(max_tokens=1900, ignore_eos=True, n=2)
        with pytest.raises(EngineUnavailableError):
            generations = service.begin([await service.encode(PROMPT, params)], request_id="r")
            await service.run(generations, lambda _generation, _text: service.client.close)

    async def run() -> None:
        client = AsyncEngine(Engine.load(EngineConfig.from_settings({})))
        await client.start()
        await asyncio.wait_for(work(TextService(client, Tokenizer.from_source(open_model(None)))), PATIENCE)

    asyncio.run(run())


def test_texts_and_chats_have_the_tokens_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(service: TextService) -> None:
        encode = service.tokenizer.encode
        monkeypatch.setattr(service.tokenizer, "encode", None)  # not in this process
        for text in ("Hi", "word " * 1000, "word " * 10_000):
            assert (await service.encode(text)).token_ids == encode(text)
            assert (await service.encode(text, add_special_tokens=False)).token_ids == encode(
                text, add_special_tokens=False
            )
            chat = await service.encode_chat([{"role": "user", "content": text}])
            assert service.tokenizer.decode(chat.token_ids, skip_special_tokens=False) == (
                f"<|bos|><|user|>{text}<|end|><|assistant|>"
            )
        assert (await service.encode([3, 4])).token_ids == (3, 4)
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            await service.encode("")
        with pytest.raises(InvalidRequestError, match="half a surrogate pair at character 2"):
            await service.encode("no\ud800")

    with_service(work)


def test_a_short_chat_does_not_wait_for_a_long_text() -> None:
    async def work(service: TextService) -> None:
        held = threading.Event()
        waiting = asyncio.create_task(service._long.run(lambda _: held.wait()))  # the long texts' thread is taken
        long = asyncio.create_task(service.encode("word " * 10_000))
        short = await service.encode_chat([{"role": "user", "content": "Hi"}])
        assert short.token_ids and not long.done()
        held.set()
        assert await waiting and (await long).token_ids

    with_service(work)


def test_a_caller_that_gives_up_while_it_waits_leaves_nothing_behind() -> None:
    async def work(service: TextService) -> None:
        held, ran = threading.Event(), []
        reported: list[Any] = []  # errors that nothing has taken note of
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        def fail(_: object) -> None:
            held.wait()
            raise InvalidRequestError("too late")

        waiting = asyncio.create_task(service._long.run(fail))
        await asyncio.sleep(0)
        others = [asyncio.create_task(service._long.run(lambda _: ran.append(1))) for _ in range(3)]
        await asyncio.sleep(0)
        waiting.cancel()  # its work goes on, and keeps the others waiting
        others[0].cancel()
        others[1].cancel()
        await asyncio.gather(waiting, *others[:2], return_exceptions=True)
        assert service._long._threads._work_queue.empty() and not service._long._free.qsize() and not ran
        held.set()
        await others[2]
        gc.collect()
        assert ran == [1] and service._long._free.qsize() == 1 and reported == []

    with_service(work)


def test_what_a_client_sends_holds_up_no_other_client() -> None:
    async def work(service: TextService) -> None:
        held = threading.Event()

        async def compiling(client: str, work: Callable[[object], Any]) -> None:
            CLIENT.set(client)
            await service._grammars.run(work)

        slow = [asyncio.create_task(compiling("one", lambda _: held.wait())) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.create_task(compiling("two", lambda _: None))
        assert not any(each.done() for each in slow)
        slow[0].cancel()  # what it began goes on, and is still that client's turn
        slow[2].cancel()
        await asyncio.gather(slow[0], slow[2], return_exceptions=True)
        await asyncio.create_task(compiling("two", lambda _: None))
        assert not slow[1].done()
        held.set()
        await slow[1]

    with_service(work)


def test_too_long_texts_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(service: TextService) -> None:
        pieces: list[int] = []
        encode = service._long.encoders[0]._tokenize

        def counted(text: str, **keywords: Any) -> tuple[int, ...]:
            pieces.append(len(text))
            return encode(text, **keywords)

        monkeypatch.setattr(service._long.encoders[0], "_tokenize", counted)
        limit = service.client.info.limits.max_model_len
        text = "word " * 3_200_000
        with pytest.raises(
            PromptTooLongError, match=f"the prompt has more than {limit} tokens: the prompt is too long"
        ):
            await service.encode(text, max_model_len=limit)
        with pytest.raises(PromptTooLongError, match="more than"):
            await service.encode_chat([{"role": "user", "content": text[:2_000_000]}], max_model_len=limit)
        assert sum(pieces) < 100_000
        with pytest.raises(PromptTooLongError, match="the prompt has 2049 tokens"):
            await service.encode([7] * 2049, max_model_len=2048)

    with_service(work)


def test_a_refusing_template_and_a_model_without_one() -> None:
    async def work(service: TextService) -> None:
        with pytest.raises(InvalidRequestError, match="the roles of this model are"):
            await service.encode_chat([{"role": "robot", "content": "Hi"}])
        service.tokenizer.chat_template = None
        other = TextService(service.client, service.tokenizer)
        with pytest.raises(InvalidRequestError, match="has no chat template"):
            await other.encode_chat([{"role": "user", "content": "Hi"}])

    with_service(work)


def test_merged_gives_all_and_closes_all() -> None:
    closed = []

    async def source(name: str, count: int) -> AsyncGenerator[str, None]:
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield f"{name}{number}"
            if count == 2:
                raise ValueError(name)
        finally:
            closed.append(name)

    async def run() -> None:
        got = [item async for item in merged([source("a", 3), source("b", 0), source("c", 4)])]
        assert sorted(got) == ["a0", "a1", "a2", "c0", "c1", "c2", "c3"]
        assert [item for item in got if item[0] == "c"] == ["c0", "c1", "c2", "c3"]
        assert sorted(closed) == ["a", "b", "c"]
        closed.clear()
        with pytest.raises(ValueError, match="e"):
            async for _ in merged([source("d", 1000), source("e", 2)]):
                pass
        assert sorted(closed) == ["d", "e"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["bundled", *tiny_tokenizers.KINDS])
def test_pieces_of_tokens_join_to_the_text(kind: str) -> None:
    made = tiny_tokenizers.KINDS.get(kind)
    tokenizer = Tokenizer.from_source(open_model(None)) if made is None else Tokenizer(made())
    pieces = TokenPieces(tokenizer)
    texts = ["The cat sat on the mat; the dog slept."]
    if kind != "metaspace_unigram":  # which has no letters for these
        texts.append("Anna hält 3 Bienen 🐝, ja! 中文 naïve")
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(pieces.of(token_id).utf8 for token_id in ids).decode()
        assert joined.removeprefix(" ") == text == tokenizer.decode(ids)
        whole = [pieces.of(token_id) for token_id in ids]
        assert all(piece.text.encode() == piece.utf8 for piece in whole if not piece.text.startswith("bytes:"))
        broken = [piece for piece in whole if piece.text.startswith("bytes:")]
        assert [piece.text for piece in broken] == [
            "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece.utf8) for piece in broken
        ]
        assert bool(broken) == (text is not texts[0])


class NoEngines:
    """A client whose engines are ready at once."""

    async def start(self) -> None:
        pass


def test_a_template_that_holds_does_not_hold_up_others() -> None:
    holds = (
        "{% if messages[0].content == 'hold' %}{% for i in range(10 ** 5) %}{% for i in range(10 ** 5) %}{% endfor %}"
    )
    template = holds + "{% endfor %}{% endif %}fine"

    def chat(service: TextService, content: str) -> asyncio.Task[PreparedRequest]:
        return asyncio.create_task(service.encode_chat([{"role": "user", "content": content}]))

    async def run() -> None:
        with closing(TextService(cast(AsyncEngine, NoEngines()), tokenizer)) as service:
            service._short.sandboxes[0]._seconds, service._long.sandboxes[0]._seconds = 0.05, PATIENCE
            held = chat(service, "hold")
            while not service.num_ended_processes:
                await asyncio.sleep(0.01)
            service._short.sandboxes[0]._seconds = PATIENCE
            assert (await chat(service, "Hi")).token_ids == tokenizer.encode("fine", add_special_tokens=False)
            assert not held.done()
            service.close()
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                await held
            assert service.num_ended_processes == 1

    tokenizer = Tokenizer(tiny_tokenizers.KINDS["byte_level"](), chat_template=template)
    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_start_that_fails_is_not_ready() -> None:
    client, tokenizer = cast(AsyncEngine, NoEngines()), Tokenizer.from_source(open_model(None))
    with closing(TextService(client, tokenizer)) as service:
        asyncio.run(service.start())
        assert not service.is_starting
    tokenizer.chat_template = "{% for %}"
    with closing(TextService(client, tokenizer)) as service:
        with pytest.raises(TokenizerError, match="broken"):
            asyncio.run(service.start())
        assert service.is_starting


def test_a_failing_template_is_an_invalid_request() -> None:
    tokenizer = Tokenizer.from_source(open_model(None))
    tokenizer.chat_template = "{{ 'x' * 2 ** 40 }}"
    service = TextService(cast(AsyncEngine, None), tokenizer)
    with pytest.raises(InvalidRequestError, match="the model's chat template") as refusal, closing(service):
        asyncio.run(service.encode_chat([{"role": "user", "content": "hello"}]))
    assert refusal.value.parameter == "messages"
