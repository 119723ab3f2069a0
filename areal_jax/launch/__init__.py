"""Starts a run's roles on one machine and watches over them: command line, checks, supervisor, live view."""
