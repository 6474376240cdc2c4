"""How fast mistral_ms is, beside others that do the same work in the same run.

``run_mixtral.py bench NAME`` starts this package; ``python -m benchmarks NAME`` is the same.
"""
