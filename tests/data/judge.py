"""A verifier for the tests of the check."""


def sees_everything(prompt: str, completion: str, answer: str, prompt_tokens: list, completion_tokens: list) -> float:
    """1.0 if all that a run gives is there."""
    return float("1+1?" in prompt and answer in completion and len(prompt_tokens) > 0 < len(completion_tokens))


def shaped(answer: str) -> dict:
    """A reward that is no accuracy."""
    return {"reward": 0.25, "accuracy": float(answer != "3")}
