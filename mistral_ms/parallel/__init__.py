"""Many processes: who they are, how they talk, what each of them computes.

Models are written as for one device. This package divides them from outside; see
``docs/design.md``. Importing it does not import MindSpore: :mod:`mistral_ms.parallel.topology` and
:mod:`mistral_ms.parallel.pipeline` are arithmetic alone.
"""
