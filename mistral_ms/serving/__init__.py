"""An OpenAI-compatible HTTP server over the inference engine.

Its packages are optional: the modules in here import them, this one does not.
"""

from mistral_ms.errors import MissingExtraError


def check_installed() -> None:
    """Raises if the server's packages are not installed.

    Raises:
        MissingExtraError: names the first one that is missing.
    """
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve", "the serve command")
