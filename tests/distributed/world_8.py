"""What needs 8 processes: two nodes of four; run by msrun."""

from distributed.dispatching import dispatch_all
from distributed.worker import Worker

worker = Worker()
dispatch_all(worker)
worker.save()
