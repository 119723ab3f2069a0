"""Faults put into tiny runs, and what must be true afterwards; `tools/fault_injection.py` is the program."""
