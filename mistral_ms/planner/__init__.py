"""Which layout fits a cluster, how fast it is, and why: memory and time of a training, calculated.

Nothing here imports MindSpore.
"""
