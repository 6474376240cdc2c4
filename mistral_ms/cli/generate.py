"""``generate``: text from a checkpoint of any known format."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_ms.cli.opening import (
    DTYPES,
    Adapter,
    ChatTemplate,
    ComputeDType,
    ComputeIn,
    FollowLinks,
    JsonResult,
    NoVerify,
    SourceFormat,
)
from mistral_ms.cli.processes import DataRanks, Execution, ExpertRanks, Stages, TensorRanks, Way

if TYPE_CHECKING:
    from mistral_ms.checkpoint import Source
    from mistral_ms.config import GenerationConfig
    from mistral_ms.inference import Generation
    from mistral_ms.inference.settings import CheckpointSettings
    from mistral_ms.tokenizer import ChatFormat, Tokenizer

CHAT_LENGTH = 4096  # positions of an interactive conversation unless told otherwise


def generate(
    ckpt: Annotated[Path, typer.Argument(help="Checkpoint of any known format.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default, is greedy.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample within this much probability. Default: 1.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample among so many tokens. Default: 0, all.", show_default=False),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1 avoids repeats. Default: 1.", show_default=False),
    ] = None,
    sampling_defaults: Annotated[
        bool,
        typer.Option(
            "--sampling-defaults",
            help="Sample as the checkpoint's generation_config.json says, where no option does.",
        ),
    ] = False,
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
    chat_template: ChatTemplate = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON file with a list of tools that the chat may call."),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin each prompt with BOS. Default: as trained."),
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Names of control tokens in prompts mean the tokens."
        ),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Positions for prompt and new tokens together.")
    ] = None,
    source: Annotated[
        SourceFormat | None, typer.Option("--from", help="Format to read, when CKPT holds several.")
    ] = None,
    adapter: Adapter = None,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    dtype: ComputeIn = ComputeDType.FP32,
    pynative: Annotated[
        bool, typer.Option("--pynative", help="Run operator by operator instead of compiled.")
    ] = False,
    dp: DataRanks = 1,
    mp: TensorRanks = 1,
    pp: Stages = 1,
    ep: ExpertRanks = 1,
    execution: Way = Execution.AUTO,
    json: JsonResult = None,
) -> None:
    """Generate text, streamed as it becomes certain."""
    from mistral_ms.cli.processes import heartbeat_of, join_processes
    from mistral_ms.config import layout_from_flags

    if interactive == bool(prompt):
        raise typer.BadParameter("give --prompt (one or more) or --interactive, not both")
    if interactive and json is not None:
        raise typer.BadParameter("--json goes with --prompt")
    chats = chat or interactive
    if not chats and (chat_template is not None or tools is not None):
        raise typer.BadParameter("--chat-template and --tools go with --chat or --interactive")
    if chats and bos is not None:
        raise typer.BadParameter("--bos and --no-bos go with plain prompts: a chat has its format")
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    setting = Setting(
        given={key: value for key, value in given.items() if value is not None},
        sampling_defaults=sampling_defaults,
        chats=chats,
        chat_template=chat_template,
        tools=tools,
        bos=bos,
        special_tokens=special_tokens,
    )
    setting.request({})  # wrong values are found before anything is read
    parallel = layout_from_flags(dp, mp, pp, ep, execution.value)
    options: dict[str, Any] = {
        "kind": source,
        "adapter": adapter,
        "verify": not no_verify,
        "follow_links": follow_links,
        "compiled": not pynative,
        "dtype": DTYPES[dtype],
    }
    if interactive and parallel.world > 1:
        raise typer.BadParameter("--interactive is for one process; give --prompt instead")
    options["parallel_context"] = parallel_context = join_processes(parallel)
    if interactive:
        _chat_loop(ckpt, setting, max_length, options)
        return
    with heartbeat_of(parallel_context) as heartbeat:
        alive = _once_a_second(lambda: heartbeat.phase("generating"))
        _complete(ckpt, list(prompt or ()), setting, max_length, options, alive, json)
        # a rank that ends before the others is taken for a failed one
        parallel_context.barrier()


@dataclass(frozen=True)
class Setting:
    """What the command line says about one call.

    Attributes:
        given: fields of the request that were named.
        sampling_defaults: take the others from the checkpoint.
        chats: prompts are turns of a conversation.
        chat_template: see :func:`~mistral_ms.tokenizer.ChatFormat`.
        tools: file with tools for the conversation.
        bos: BOS before a plain prompt; None is as the tokenizer says.
        special_tokens: prompts may spell control tokens.
    """

    given: Mapping[str, Any]
    sampling_defaults: bool
    chats: bool
    chat_template: str | None
    tools: Path | None
    bos: bool | None
    special_tokens: bool

    def request(self, sampling: Mapping[str, float]) -> GenerationConfig:
        """The request; ``sampling`` is the checkpoint's word where it is asked for."""
        from mistral_ms.config import GenerationConfig
        from mistral_ms.config.base import validate

        defaults = sampling if self.sampling_defaults else {}
        return validate(GenerationConfig, {**defaults, **self.given}, "generate")

    def read_tools(self) -> list[dict[str, Any]] | None:
        """The tools, if there is a file of them."""
        from mistral_ms.errors import GenerationError
        from mistral_ms.reading import CONFIG_BYTES, parse_json, read_text

        if self.tools is None:
            return None
        try:
            found = parse_json(read_text(self.tools, GenerationError, CONFIG_BYTES))
        except ValueError as error:
            raise GenerationError("not JSON", where=self.tools, value=error) from error
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            rule = "must be a list of JSON schemas"
            raise GenerationError("not a list of tools", where=self.tools, rule=rule)
        return found

    def chat(self, tokenizer: Tokenizer, ends: Collection[int]) -> ChatFormat:
        """The format of conversations."""
        from mistral_ms.tokenizer import ChatFormat

        return ChatFormat(tokenizer, self.chat_template, ends, self.special_tokens)

    def prompt_ids(
        self, tokenizer: Tokenizer, ends: Collection[int], prompts: Sequence[str]
    ) -> list[list[int]]:
        """The ids of prompts."""
        if self.chats:
            form, tools = self.chat(tokenizer, ends), self.read_tools()
            return [form.encode_chat([{"role": "user", "content": t}], tools) for t in prompts]
        bos = tokenizer.adds_bos if self.bos is None else self.bos
        if not self.special_tokens:
            return [tokenizer.encode(text, bos=bos) for text in prompts]
        lead = [tokenizer.bos_id] if bos else []
        return [lead + tokenizer.encode_special(text)[0] for text in prompts]


def _say_settings(settings: CheckpointSettings, setting: Setting) -> None:
    """Says on stderr what the checkpoint's files contradict, and what they suggest."""
    from rich.console import Console

    lines = [f"note: {note}" for note in settings.notes]
    suggested = {k: v for k, v in settings.sampling.items() if k not in setting.given}
    if suggested:
        shown = ", ".join(f"{key} {value}" for key, value in suggested.items())
        use = "used" if setting.sampling_defaults else "not used; --sampling-defaults does"
        lines.append(f"generation_config.json samples with {shown} ({use})")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, style="dim", markup=False)


def _complete(
    ckpt: Path,
    prompts: list[str],
    setting: Setting,
    max_length: int | None,
    options: dict[str, Any],
    alive: Callable[[], None],
    json: Path | None,
) -> None:
    """Continues each prompt; one prompt streams, several are printed in order when done.

    All processes compute, the first one speaks. ``alive`` is called with every token.
    """
    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.cli.opening import of_checkpoint
    from mistral_ms.inference import load_engine
    from mistral_ms.inference.lengths import MOST_SLOTS, required_length
    from mistral_ms.inference.settings import read_checkpoint_settings
    from mistral_ms.tokenizer import load_tokenizer

    chat, speaks = setting.chats, options["parallel_context"].is_rank_0
    with open_checkpoint(ckpt, **of_checkpoint(options)) as checkpoint:
        if speaks:
            _remark(checkpoint, options)
        tokenizer = load_tokenizer(checkpoint.path)
        settings = read_checkpoint_settings(checkpoint.path, checkpoint.config, tokenizer)
        request = setting.request(settings.sampling)
        ids = setting.prompt_ids(tokenizer, settings.eos_ids, prompts)
        needed = required_length(checkpoint.config, ids, request)
        length = needed if max_length is None else max_length
    if speaks:
        _say_settings(settings, setting)
    engine = load_engine(ckpt, batch=min(len(ids), MOST_SLOTS), max_length=length, **options)

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
    ckpt: Path, setting: Setting, max_length: int | None, options: dict[str, Any]
) -> None:
    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.cli.opening import of_checkpoint
    from mistral_ms.errors import MistralMsError
    from mistral_ms.inference import load_engine
    from mistral_ms.inference.chat import ChatSession
    from mistral_ms.inference.settings import read_checkpoint_settings
    from mistral_ms.tokenizer import load_tokenizer

    with open_checkpoint(ckpt, **of_checkpoint(options)) as checkpoint:
        _remark(checkpoint, options)
        tokenizer = load_tokenizer(checkpoint.path)
        positions = checkpoint.config.longest_sequence
        settings = read_checkpoint_settings(checkpoint.path, checkpoint.config, tokenizer)
    chat, tools = setting.chat(tokenizer, settings.eos_ids), setting.read_tools()
    _say_settings(settings, setting)
    length = min(CHAT_LENGTH, positions) if max_length is None else max_length
    engine = load_engine(ckpt, max_length=length, **options)
    session = ChatSession(engine, setting.request(settings.sampling), chat, tools)
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


def _remark(checkpoint: Source, options: Mapping[str, Any]) -> None:
    """Says on stderr, for stdout is the text, what of a checkpoint has no effect or another one."""
    from rich.console import Console

    from mistral_ms.inference.load import stays_quantized

    wanted = {key: options[key] for key in ("parallel_context", "dtype", "adapter")}
    if remark := checkpoint.remark(stays_quantized(checkpoint, **wanted)):
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
