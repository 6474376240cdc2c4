"""One server over a tiny model, for all files of this folder: they run in one process."""

import dataclasses

import httpx
import openai
import pytest
from support.hf import make_pair
from support.serving import KEY, LENGTH, MESSAGES, SAMPLED, SETTINGS, TEXT, crowd, start

from mistral_ms.config import GenerationConfig
from mistral_ms.inference import Engine
from mistral_ms.serving.runner import EngineRunner
from mistral_ms.tokenizer import ChatFormat, copy_files, packaged_tokenizer


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    pair = make_pair(
        "mixtral", vocab_size=32000, hidden_size=32, max_position_embeddings=1024, eos_token_id=None
    )
    pair.hf.save_pretrained(path)
    copy_files(packaged_tokenizer(), path)
    # no end token: how long an answer is depends on the request alone
    return Engine.load(path, batch=4, max_length=LENGTH, chunk=32, eos_ids=())


@pytest.fixture(scope="session")
def chat(engine):
    return ChatFormat(engine.tokenizer, "mistral")


@pytest.fixture(scope="session")
def wanted(engine, chat):
    """What the engine itself generates, before the server has it."""
    # the shapes that the server needs anyway: nothing more is compiled
    engine.steps.prefill_shapes = lambda lengths, chunk: engine.steps.fixed_shapes(chunk)
    text = engine.tokenizer.encode(TEXT)
    turns = chat.encode_chat(
        [{**MESSAGES[0]}, {"role": "user", "content": "Where is the harbour?"}]
    )

    def one(ids, continues, **settings):
        request = GenerationConfig(**settings)
        return engine.generate([ids], request, continues=continues).completions[0]

    return {
        "greedy": one(text, True, max_new_tokens=12, top_logprobs=2),
        "sampled": one(text, True, max_new_tokens=12, **SAMPLED),
        "chat": one(turns, False, max_new_tokens=12, top_logprobs=2),
        "chat sampled": one(turns, False, max_new_tokens=12, **SAMPLED),
        "crowd": engine.generate(crowd(), GenerationConfig(max_new_tokens=5)).completions,
        "prompt": len(text),
        "chat prompt": len(turns),
    }


@pytest.fixture(scope="session")
def runner(engine, wanted):
    runner = EngineRunner(engine)
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="session")
def running(runner, engine, chat):
    running = start(runner, engine, chat, SETTINGS)
    yield running
    running.end()


@pytest.fixture(scope="session")
def client(running):
    with httpx.Client(trust_env=False) as inner:
        yield openai.OpenAI(
            base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner, timeout=60
        )


@pytest.fixture
def settings(running):
    """A function that changes the server's settings for one test."""

    def change(**values):
        running.service.settings = dataclasses.replace(SETTINGS, **values)

    yield change
    running.service.settings = SETTINGS
