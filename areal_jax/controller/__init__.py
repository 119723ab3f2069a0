"""The hub of a run: who generates what, what is trained on, who is still there. `core` decides, `service` talks."""
