"""Verifiers and the pool of processes that runs them.

`verify_math` judges mathematics. Any function by import path, sync or async, is a verifier: `VerifierPool` calls it in
a fresh process under a time limit and gives back a `Score` or a named `Failure`. Importing this package imports neither
jax nor any verifier's library.
"""

from areal_jax.rewards.mathematics import verify_math
from areal_jax.rewards.outcome import Failure, Outcome, Score, VerifierError, VerifierTimeout
from areal_jax.rewards.pool import VerifierPool

__all__ = ["Failure", "Outcome", "Score", "VerifierError", "VerifierPool", "VerifierTimeout", "verify_math"]
