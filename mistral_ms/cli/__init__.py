"""The command line: one file a command."""

from mistral_ms import signals


def main() -> None:
    """Runs one command; see :func:`mistral_ms.cli.app.run` and :func:`mistral_ms.signals.run`."""

    def command() -> None:
        from mistral_ms.cli.app import run  # not before the handlers are there

        run()

    signals.run(command)


__all__ = ["main"]
