"""``serve``: an OpenAI-compatible HTTP server for a checkpoint of any known format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_ms.cli.opening import (
    DTYPES,
    Adapter,
    ChatTemplate,
    ComputeDType,
    ComputeIn,
    FollowLinks,
    NoVerify,
    SourceFormat,
)

SHORTEST_KEY = 16


def serve(
    ckpt: Annotated[Path, typer.Argument(help="Checkpoint of any known format.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests. Default: that of its directory."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that requests must bring, of at least 16 characters. "
            "Default: no key."
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="Sequences that are computed side by side.")
    ] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Positions for prompt and new tokens. Default: 4096, or fewer."),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Prompt tokens that are computed between two new ones.")
    ] = 128,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Prompts that may wait for a slot; more are refused (429).")
    ] = 128,
    max_body: Annotated[
        int, typer.Option(min=1024, help="Bytes of a request's body; more are refused (413).")
    ] = 1 << 20,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request may take (504).")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests after SIGTERM or Ctrl-C.")
    ] = 30.0,
    sampling_defaults: Annotated[
        bool,
        typer.Option(
            "--sampling-defaults",
            help="Sample as the checkpoint's generation_config.json says, where a request does "
            "not. Default: temperature 1.",
        ),
    ] = False,
    chat_template: ChatTemplate = None,
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
) -> None:
    """Serve a model over HTTP, with OpenAI's interface and a chat page."""
    from mistral_ms.serving import check_installed

    check_installed()
    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.checkpoint.load import kept_quantization
    from mistral_ms.cli.opening import of_checkpoint
    from mistral_ms.inference import Engine
    from mistral_ms.inference.settings import read_checkpoint_settings
    from mistral_ms.serving.runner import EngineRunner
    from mistral_ms.serving.server import Server
    from mistral_ms.serving.service import Service
    from mistral_ms.serving.settings import LENGTH, ServerSettings
    from mistral_ms.tokenizer import load_tokenizer

    key = None if api_key_file is None else _key(api_key_file)
    _check_port(host, port)
    options: dict[str, Any] = {
        "kind": source,
        "verify": not no_verify,
        "follow_links": follow_links,
    }
    with open_checkpoint(ckpt, **of_checkpoint({**options, "verify": False})) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.path)
        found = read_checkpoint_settings(checkpoint.path, checkpoint.config, tokenizer)
        longest = checkpoint.config.longest_sequence
        kept = adapter is None and kept_quantization(checkpoint, DTYPES[dtype]) is not None
        remark = checkpoint.remark(kept)
    settings = ServerSettings(
        model=served_model_name or ckpt.resolve().name,
        host=host,
        port=port,
        api_key=key,
        sampling=found.sampling if sampling_defaults else {},
        most_waiting=max_waiting,
        most_body_bytes=max_body,
        request_seconds=request_timeout,
        shutdown_seconds=shutdown_timeout,
    )
    if remark:
        _say(remark)
    for note in found.notes:
        _say(f"note: {note}")
    engine = Engine.load(
        ckpt,
        batch=slots,
        max_length=min(LENGTH, longest) if max_length is None else max_length,
        chunk=chunk,
        graph=not pynative,
        dtype=DTYPES[dtype],
        adapter=adapter,
        **options,
    )
    chat = _chat(tokenizer, chat_template, found.eos_ids)
    if key is None and not settings.local:
        _say("warning: everybody who reaches this address can use the model: no --api-key-file")
    _say("compiling")
    runner = EngineRunner(engine)
    runner.start()

    def ready(port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {settings.model} at http://{shown}:{port}", flush=True)

    Server(Service(runner, tokenizer, settings, chat), ready).serve_until_told()


def _check_port(host: str, port: int) -> None:
    """Listens for a moment: loading and compiling take long, and the server listens after them.

    Raises:
        ConfigError: no server can listen there.
    """
    import socket

    from mistral_ms.errors import ConfigError

    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = places[0]
        with socket.socket(family, kind, protocol) as tried:
            # as uvicorn does: connections that have ended do not hold the port
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as error:
        raise ConfigError(
            "cannot listen",
            where=f"{host} port {port}",
            value=error.strerror or error,
            rule="the address must be this machine's, and the port free",
            todo="give another --host or --port; --port 0 takes a free one",
        ) from error


def _key(path: Path) -> str:
    """The key in a file, without the space around it."""
    from mistral_ms.errors import ConfigError
    from mistral_ms.reading import CONFIG_BYTES, read_text

    key = read_text(path, ConfigError, CONFIG_BYTES).strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "not a key",
            where=path,
            value=f"{len(key)} characters",
            rule=f"one word of at least {SHORTEST_KEY} printable ASCII characters",
            todo="write one with: openssl rand -hex 32",
        )
    return key


def _chat(tokenizer: Any, template: str | None, ends: tuple[int, ...]) -> Any:
    """The chat format; of a model that has none the error that requests will get."""
    from mistral_ms.errors import TokenizerError
    from mistral_ms.tokenizer import ChatFormat

    try:
        return ChatFormat(tokenizer, template, ends)
    except TokenizerError as error:
        if template is not None:
            raise
        _say(f"note: {error}")
        return error


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False)
