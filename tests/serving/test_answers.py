"""The server over real sockets, asked by OpenAI's client: its answers are the engine's."""

import asyncio

import httpx
import numpy as np
import openai
import pytest
from support.serving import CROWD, KEY, LENGTH, MODEL, SAMPLED, TEXT, complete, crowd, idle, talk

pytestmark = pytest.mark.slow  # the three files together: some 25 s of processor time


class TestAnswers:
    @pytest.mark.parametrize("way", ["greedy", "sampled"])
    def test_completion(self, client, wanted, way):
        found = complete(client, **(SAMPLED if way == "sampled" else {}))
        assert found.object == "text_completion"
        assert found.choices[0].text == wanted[way].text
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == wanted["prompt"]
        assert found.usage.completion_tokens == 12
        assert found.usage.total_tokens == wanted["prompt"] + 12

    @pytest.mark.parametrize("way", ["chat", "chat sampled"])
    def test_chat(self, client, wanted, way):
        found = talk(client, **(SAMPLED if "sampled" in way else {}))
        assert found.object == "chat.completion"
        assert found.choices[0].message.role == "assistant"
        assert found.choices[0].message.content == wanted[way].text
        assert found.usage.prompt_tokens == wanted["chat prompt"]

    def test_completion_streamed(self, client, wanted):
        chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks[:-1]) == wanted["greedy"].text
        assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 12
        assert len({c.id for c in chunks}) == 1

    def test_chat_streamed(self, client, wanted):
        chunks = list(talk(client, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(pieces) == wanted["chat"].text
        assert len([piece for piece in pieces if piece]) > 2, "in pieces"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert all(c.usage is None for c in chunks)

    def test_stop(self, client, wanted):
        text = wanted["greedy"].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        choice = complete(client, stop=[stop, "never this"]).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"

    def test_logprobs_of_a_completion(self, client, engine, wanted):
        done = wanted["greedy"]
        (choice,) = complete(client, logprobs=2).choices
        found = choice.logprobs
        # the same steps beside other rows: float32 products in other shapes
        np.testing.assert_allclose(found.token_logprobs, done.logprobs, atol=1e-4)
        assert [len(top) for top in found.top_logprobs] == [2] * 12
        for top, own, name in zip(
            found.top_logprobs, found.token_logprobs, found.tokens, strict=True
        ):
            assert top[name] == own == max(top.values()), "greedy"
        names = [engine.tokenizer.piece(i).text for i in done.token_ids]
        assert [a for a, b in zip(found.tokens, names, strict=True) if b] == list(
            filter(None, names)
        )
        assert found.text_offset[0] == 0
        assert found.text_offset == sorted(found.text_offset)

    def test_logprobs_of_a_chat_streamed(self, client, wanted):
        chunks = list(talk(client, stream=True, logprobs=True, top_logprobs=2))
        entries = [e for c in chunks[1:] for e in c.choices[0].logprobs.content]
        done = wanted["chat"]
        np.testing.assert_allclose([e.logprob for e in entries], done.logprobs, atol=1e-4)
        for entry, top in zip(entries, done.top_logprobs, strict=True):
            found = [each.logprob for each in entry.top_logprobs]
            np.testing.assert_allclose(found, [logprob for _, logprob in top], atol=1e-4)
            assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token

    def test_a_seed_repeats_and_none_does_not(self, client):
        hot = {"temperature": 1.5, "max_tokens": 16}
        seeded = {complete(client, seed=5, **hot).choices[0].text for _ in range(2)}
        free = {complete(client, **hot).choices[0].text for _ in range(2)}
        assert (len(seeded), len(free)) == (1, 2)

    def test_several_prompts_and_ids(self, client, engine, wanted):
        ids = engine.tokenizer.encode(TEXT)
        found = complete(client, prompt=[ids, crowd()[3]], max_tokens=5)
        assert [choice.index for choice in found.choices] == [0, 1]
        assert wanted["greedy"].text.startswith(found.choices[0].text)
        assert found.choices[1].text == wanted["crowd"][3].text

    def test_as_many_tokens_as_there_are_positions(self, client, chat):
        """A chat without max_tokens; the default of completions is OpenAI's."""
        messages = [{"role": "user", "content": "a " * 930}]
        prompt = len(chat.encode_chat(messages))
        found = talk(client, messages=messages, max_tokens=None)
        assert found.usage.completion_tokens == LENGTH - prompt > 0
        assert complete(client, max_tokens=None).usage.completion_tokens == 16

    def test_64_at_once(self, running, wanted):
        """Of 64 clients, each with a connection of its own, everyone gets its own answer."""

        async def ask():
            limits = httpx.Limits(max_connections=CROWD)
            async with httpx.AsyncClient(trust_env=False, limits=limits) as inner:
                client = openai.AsyncOpenAI(
                    base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner
                )

                async def one(number, prompt):
                    values = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "model": MODEL}
                    if number % 2:
                        return (await client.completions.create(**values)).choices[0].text
                    stream = await client.completions.create(**values, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream])

                return await asyncio.gather(*(one(*each) for each in enumerate(crowd())))

        assert asyncio.run(ask()) == [done.text for done in wanted["crowd"]]


class TestClientsThatLeave:
    def test_from_a_stream(self, client, running):
        before = idle(running)
        with complete(client, stream=True, max_tokens=900) as stream:
            next(iter(stream))
        after = idle(running)
        left = 'mistral_ms_requests_total{endpoint="/v1/completions",status="499"}'
        assert after[left] - before.get(left, 0.0) == 1
        name = "mistral_ms_generated_tokens_total"
        assert 0 < after[name] - before[name] < 900

    def test_from_an_answer(self, client, running):
        before = idle(running)
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.2), max_tokens=990)
        after = idle(running)
        left = 'mistral_ms_requests_total{endpoint="/v1/completions",status="499"}'
        assert after[left] - before.get(left, 0.0) == 1
