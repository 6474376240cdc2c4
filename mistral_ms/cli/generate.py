"""``generate``: text from a checkpoint of any known format."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_ms.cli.convert import SourceFormat
from mistral_ms.cli.processes import DataRanks, ExpertRanks, Stages, TensorRanks

if TYPE_CHECKING:
    from mistral_ms.checkpoint import Source
    from mistral_ms.config import GenerationConfig
    from mistral_ms.inference import Engine, Generation


class ComputeDType(StrEnum):
    """What weights and activations are computed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
CHAT_LENGTH = 4096  # positions of an interactive conversation unless told otherwise


def generate(
    ckpt: Annotated[Path, typer.Argument(help="Checkpoint of any known format.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample within this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repeats.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format each prompt as a user's turn (instruct models).")
    ] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Chat in a loop; /reset forgets, /exit ends.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Positions for prompt and new tokens together.")
    ] = None,
    source: Annotated[
        SourceFormat | None, typer.Option("--from", help="Format to read, when CKPT holds several.")
    ] = None,
    dtype: Annotated[
        ComputeDType, typer.Option(help="Compute in this; bf16 needs an NPU.")
    ] = ComputeDType.FP32,
    pynative: Annotated[
        bool, typer.Option("--pynative", help="Run operator by operator instead of compiled.")
    ] = False,
    dp: DataRanks = 1,
    mp: TensorRanks = 1,
    pp: Stages = 1,
    ep: ExpertRanks = 1,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file as JSON.")
    ] = None,
) -> None:
    """Generate text, streamed as it becomes certain."""
    from mistral_ms.cli.processes import heartbeat_of, join_processes
    from mistral_ms.config import GenerationConfig, layout_from_flags
    from mistral_ms.config.base import validate

    if interactive == bool(prompt):
        raise typer.BadParameter("give --prompt (one or more) or --interactive, not both")
    if interactive and json is not None:
        raise typer.BadParameter("--json goes with --prompt")
    request = validate(
        GenerationConfig,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": tuple(stop or ()),
        },
        "generate",
    )
    parallel = layout_from_flags(dp, mp, pp, ep)
    options: dict[str, Any] = {
        "kind": source,
        "graph": not pynative,
        "dtype": DTYPES[dtype],
    }
    if interactive and parallel.world > 1:
        raise typer.BadParameter("--interactive is for one process; give --prompt instead")
    options["division"] = division = join_processes(parallel)
    if interactive:
        _chat_loop(ckpt, request, max_length, options)
        return
    with heartbeat_of(division) as heartbeat:
        alive = _once_a_second(lambda: heartbeat.phase("generating"))
        _complete(ckpt, list(prompt or ()), request, chat, max_length, options, alive, json)
        # a rank that ends before the others is taken for a failed one
        division.wait_for_all()


def _complete(
    ckpt: Path,
    prompts: list[str],
    request: GenerationConfig,
    chat: bool,
    max_length: int | None,
    options: dict[str, Any],
    alive: Callable[[], None],
    json: Path | None,
) -> None:
    """Continues each prompt; one prompt streams, several are printed in order when done.

    All processes compute, the first one speaks. ``alive`` is called with every token.
    """
    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.inference import Engine
    from mistral_ms.inference.lengths import required_length
    from mistral_ms.tokenizer import ChatFormat, load_tokenizer

    tokenizer = load_tokenizer(ckpt)
    if chat:
        form = ChatFormat(tokenizer)
        ids = [form.encode_chat([{"role": "user", "content": text}]) for text in prompts]
    else:
        ids = [tokenizer.encode(text) for text in prompts]
    with open_checkpoint(ckpt, options["kind"]) as checkpoint:
        if options["division"].is_first:
            _remark(checkpoint)
        needed = required_length(checkpoint.config, ids, request)
        length = needed if max_length is None else max_length
    engine = Engine.load(ckpt, batch=len(ids), max_length=length, **options)
    speaks = options["division"].is_first

    def stream(number: int, text: str) -> None:
        alive()
        if len(prompts) == 1 and speaks:
            print(text, end="", flush=True)

    if not speaks:
        engine.generate(ids, request, stream, continues=not chat)
        return
    if len(prompts) == 1 and not chat:
        print(prompts[0], end="", flush=True)
    result = engine.generate(ids, request, stream, continues=not chat)
    if len(prompts) == 1:
        print()
    else:
        for number, (text, done) in enumerate(zip(prompts, result.completions, strict=True)):
            print(f"[{number}] {'' if chat else text}{done.text}")
    _report(result)
    if json is not None:
        from mistral_ms.cli.output import write_json

        write_json(json, _to_json(prompts, result))


def _once_a_second(call: Callable[[], None]) -> Callable[[], None]:
    """For calls that cost a write to a disk that many share."""
    last = -1.0

    def maybe() -> None:
        nonlocal last
        if time.monotonic() - last >= 1:
            last = time.monotonic()
            call()

    return maybe


def _chat_loop(
    ckpt: Path, request: GenerationConfig, max_length: int | None, options: dict[str, Any]
) -> None:
    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.errors import MistralMsError
    from mistral_ms.inference import Engine
    from mistral_ms.inference.chat import ChatSession

    with open_checkpoint(ckpt, options["kind"]) as checkpoint:
        _remark(checkpoint)
        positions = checkpoint.config.longest_sequence
    length = min(CHAT_LENGTH, positions) if max_length is None else max_length
    engine: Engine = Engine.load(ckpt, max_length=length, **options)
    session = ChatSession(engine, request)
    print("Chat. /reset forgets the conversation, /exit or Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            session.reset()
            print("(forgotten)")
        elif text:
            try:
                session.say(text, lambda piece: print(piece, end="", flush=True))
                print()
            except MistralMsError as error:  # the conversation goes on
                print(f"error: {error}")


def _remark(checkpoint: Source) -> None:
    """Says on stderr, for stdout is the text, what of the configuration has no effect."""
    from rich.console import Console

    if remark := checkpoint.remark():
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            remark, style="dim", markup=False
        )


def _report(result: Generation) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(
        f"prefill {result.prefill_tokens} tokens at {result.prefill_tokens_per_s:.1f}/s, "
        f"decode {result.decode_tokens} at {result.decode_tokens_per_s:.1f}/s, "
        f"compiled in {result.compile_seconds:.1f} s",
        style="dim",
    )


def _to_json(prompts: list[str], result: Generation) -> dict[str, Any]:
    return {
        "outputs": [
            {
                "prompt": prompt,
                "text": done.text,
                "token_ids": list(done.token_ids),
                "logprobs": list(done.logprobs),
                "finish_reason": done.finish_reason,
            }
            for prompt, done in zip(prompts, result.completions, strict=True)
        ],
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
    }
