"""Exit codes by which a role tells whoever started it whether to start it again; any other but 0 was an accident."""

WRONG_SETTING = 2
CANNOT_GO_ON = 70  # the run is at its end, with a reason: another process would find the same
TOLD_TO_STOP = 75  # all that is needed to go on later is saved
