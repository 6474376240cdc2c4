"""The command line of mistral_ms; `msrun` starts this file on every rank."""

from mistral_ms.cli import main

if __name__ == "__main__":
    main()
