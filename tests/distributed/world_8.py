"""Everything that is checked with 8 processes; run by msrun."""

from distributed.dispatching import dispatch_all
from distributed.training import run_training
from distributed.worker import Worker

worker = Worker()
dispatch_all(worker)
run_training(worker)
worker.save()
