"""What ``dryrun`` compiles: the graphs of :mod:`mistral_ms.parallel.graph`, in a process that knows
every gate of the package.
"""

from mistral_ms.config import when_unknown
from mistral_ms.parallel.graph import build, decode, prefill, set_context
from mistral_ms.shipped import import_shipped

when_unknown(import_shipped)  # the process reads the run file anew

__all__ = ["build", "decode", "prefill", "set_context"]
