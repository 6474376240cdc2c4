"""What needs 8 processes: two nodes of four; run by msrun."""

from distributed.dispatching import dispatch_all
from distributed.worker import Worker

Worker().run(
    dispatch_all,
)
