"""Damaged and hostile files for every reader, each read in a process of its own limits.

``python -m fuzz --cases 10000`` (or ``make fuzz``); a failing case is repeated by its number.
"""
