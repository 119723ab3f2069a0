"""Evaluation of a checkpoint: `python -m areal_jax.eval`, made of the same parts as a run's rollouts and rewards."""
