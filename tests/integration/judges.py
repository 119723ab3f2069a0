"""Verifiers for runs of random networks: about half of whatever they write is right. No jax in here."""


def parity(completion: str, answer: str) -> float:
    """1.0 if the completion's characters add up to a number as odd or even as the answer."""
    return float(sum(map(ord, completion)) % 2 == int(answer) % 2)
