"""Compiling Ascend graphs of any rank on a machine without Ascend, and reading them.

MindSpore's own dry run does the compiling; here are the libraries it wants (:mod:`standins`), the
process it runs in (:mod:`process`), a reader of the graph that it leaves (:mod:`ir`), and what is
said about it (:mod:`report`). Importing this does not import MindSpore. See ``docs/dryrun.md``.
"""
