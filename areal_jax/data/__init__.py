"""Prompt data: reading published data sets and rendering their records to tokens."""
