"""Training on one device: data, optimizer, step, loop."""
