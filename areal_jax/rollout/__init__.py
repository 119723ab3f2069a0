"""Generates: an engine (embedded or vLLM), workflows that make samples on it, and the worker that runs both."""
