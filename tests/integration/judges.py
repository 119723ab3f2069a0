"""Verifiers for runs of random networks: about half of whatever they write is right. No jax in here."""


def parity(completion: str, answer: str) -> float:
    """1.0 if the completion's characters add up to a number as odd or even as the answer."""
    return float(sum(map(ord, completion)) % 2 == int(answer) % 2)


def touchy(completion: str, answer: str) -> dict:
    """As `parity`, with a reward that is shaped; breaks on every third answer."""
    if int(answer) % 3 == 0:
        raise RuntimeError(f"the answer {answer} is not to be judged")
    right = parity(completion, answer)
    return {"reward": right - 0.01 * len(completion), "accuracy": right}
