"""Verifiers and the pool of processes that runs them.

`verify_math` judges mathematics, `verify_code` programs. Any function by import path, sync or async, is a verifier:
`VerifierPool` calls it in a fresh process under a time limit and gives back a `Score` or a named `Failure`. Importing
this package imports neither jax nor any verifier's library.
"""

from areal_jax.rewards.code import grade_code, verify_code
from areal_jax.rewards.mathematics import verify_math
from areal_jax.rewards.outcome import Failure, Outcome, Score, VerifierError, VerifierTimeout
from areal_jax.rewards.pool import VerifierPool

__all__ = [
    "Failure",
    "Outcome",
    "Score",
    "VerifierError",
    "VerifierPool",
    "VerifierTimeout",
    "grade_code",
    "verify_code",
    "verify_math",
]
