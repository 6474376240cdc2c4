"""``experts``: adds, removes, exports and imports experts of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_ms.cli.opening import FollowLinks, JsonResult, NoVerify, Overwrite
from mistral_ms.enums import StrEnum

OPENING = 50
"""Updates until tokens may choose new experts."""


class Start(StrEnum):
    """What new experts begin as."""

    COPY = "copy"
    FRESH = "fresh"


def experts(
    src: Annotated[Path, typer.Argument(help="Checkpoint of a sparse model, of any format.")],
    dst: Annotated[
        Path, typer.Argument(help="Directory to write; with --export the file to write.")
    ],
    add: Annotated[int | None, typer.Option(help="Add so many, behind the others.")] = None,
    remove: Annotated[
        str | None, typer.Option(help="Remove these: numbers with commas between them.")
    ] = None,
    export: Annotated[int | None, typer.Option(help="Write this one to a file.")] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Add one that --export wrote.")
    ] = None,
    freeze: Annotated[
        int | None, typer.Option(help="Train the first so many no more; 0 trains all.")
    ] = None,
    start: Annotated[
        Start, typer.Option(help="With --add: they begin as copies of old ones, or fresh.")
    ] = Start.COPY,
    train_old: Annotated[
        bool,
        typer.Option(
            "--train-old",
            help="With --add: no experts are frozen, those of earlier stages neither.",
        ),
    ] = False,
    opening_updates: Annotated[
        int, typer.Option(help="With --add: updates until tokens may choose the new ones.")
    ] = OPENING,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    json: JsonResult = None,
) -> None:
    """Add experts to every sparse layer of a checkpoint, or remove, export, import, freeze some."""
    from dataclasses import asdict

    from rich.console import Console

    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.cli.output import byte_progress, size_text, write_json
    from mistral_ms.errors import ConfigError
    from mistral_ms.mixtures import expand

    asked = {"--add": add, "--remove": remove, "--export": export, "--import": import_}
    asked["--freeze"] = freeze
    _check_one([name for name, value in asked.items() if value is not None])
    if add is None and (train_old or start is not Start.COPY or opening_updates != OPENING):
        rule = "--start, --train-old and --opening-updates go with --add"
        raise ConfigError("options of another action", where="experts", rule=rule)
    if export is not None and dst.exists() and not overwrite:
        raise ConfigError(
            "something is there", where=dst, rule="a file is replaced with --overwrite alone"
        )
    console = Console()
    with (
        byte_progress(console, "writing") as progress,
        open_checkpoint(src, verify=not no_verify, follow_links=follow_links) as source,
    ):
        if remark := source.remark():
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
        options: dict[str, Any] = {"overwrite": overwrite, "progress": progress}
        if export is not None:
            found: dict[str, Any] = {
                "expert": export,
                "bytes": expand.export_expert(source, dst, export),
            }
            said = f"expert {export}"
        else:
            if add is not None:
                result = expand.add_experts(
                    source,
                    dst,
                    add,
                    start.value,
                    freeze=not train_old,
                    opening_updates=opening_updates,
                    **options,
                )
            elif freeze is not None:
                result = expand.freeze_experts(source, dst, freeze, **options)
            elif remove is not None:
                result = expand.remove_experts(source, dst, _numbers(remove), **options)
            else:
                assert import_ is not None
                result = expand.import_expert(source, import_, dst, **options)
            found = asdict(result)
            said = f"{result.experts} experts a layer, {result.frozen_experts} of them frozen"
    console.print(
        f"{src} -> {dst}: {said}, {size_text(found['bytes'])}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if json is not None:
        write_json(json, found)


def _check_one(asked: Sequence[str]) -> None:
    from mistral_ms.errors import ConfigError

    if len(asked) != 1:
        raise ConfigError(
            "what shall be done?" if not asked else "several things at once",
            where="experts",
            value=", ".join(asked) or None,
            rule="give one of --add, --remove, --export, --import and --freeze",
        )


def _numbers(text: str) -> list[int]:
    from mistral_ms.errors import ConfigError

    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        rule = "numbers with commas between them"
        raise ConfigError("no numbers", where="--remove", value=text, rule=rule) from None
