"""The launcher of a run, with one role started by `tools.faults.points`: python -m tools.faults.launcher PLAN

PLAN is JSON: workdir, settings ({"section.key": value} on top of the tiny run's), role and fault (both may be empty),
logs (a folder to be used instead of the run's own; may be empty).
"""

import dataclasses
import json
import sys
from pathlib import Path

from areal_jax.config import ConfigError, default_config, resolve
from areal_jax.launch import session
from areal_jax.launch.roles import roles_of

ROOT = Path(__file__).parents[2]
EPOCHS, PROMPTS, GROUP, BOUND = 1, 30, 4, 2
TINY = {
    "model": str(ROOT / "configs" / "toy"),
    "data.train": f"arithmetic:count={PROMPTS},seed=1,min_terms=2,max_terms=4",
    "data.eval": "arithmetic:count=12,seed=2,min_terms=2,max_terms=4",
    "controller.batch_size": 4,
    "controller.group_size": GROUP,
    "controller.max_staleness": BOUND,
    "controller.epochs": EPOCHS,
    "controller.heartbeat_seconds": 0.25,
    "controller.heartbeat_limit": 6.0,
    "controller.progress_limit": 150.0,
    "rollout.slots": 16,
    "rollout.max_length": 64,
    "rollout.max_new_tokens": 40,
    "rollout.weights_timeout": 20.0,
    "rewards.timeout": 5.0,
    "trainer.steps": 100,  # the run ends with its data, after 8
    "trainer.proximal": "fused",
    "trainer.row_length": 64,
    "trainer.rows": 8,
    "trainer.checkpoint_every": 2,
    "trainer.eval_every": 3,
    "trainer.batch_timeout": 150.0,
    "metrics.tensorboard": False,
    "metrics.view": "none",
    "launch.stop_grace": 20.0,
    "launch.trainer_restarts": 3,
}


def config_of(settings: dict) -> dict:
    """The tiny run's config with `settings` on top, resolved."""
    config = default_config()
    for key, value in (TINY | settings).items():
        *sections, name = key.split(".")
        target = config
        for part in sections:
            target = target[part]
        with target.unlocked():
            target[name] = tuple(value) if isinstance(value, list) else value
    return resolve(config)


def put_logs_apart(link: Path, folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(folder)


def main(plan: dict) -> int:
    config = config_of(plan["settings"])

    def roles_with_fault(config, workdir, share=None):
        roles, leaders = roles_of(config, workdir, share)
        for i, role in enumerate(roles):
            if plan["role"] and role.name.startswith(plan["role"]):
                python, _, module, *arguments = role.command
                command = (python, "-m", "tools.faults.points", json.dumps(plan["fault"]), module, *arguments)
                roles[i] = dataclasses.replace(role, command=command)
        return roles, leaders

    session.roles_of = roles_with_fault
    try:
        session.prepare(config, plan["workdir"])
        if plan["logs"]:
            put_logs_apart(Path(plan["workdir"]) / "logs", Path(plan["logs"]))
    except ConfigError as error:
        print(f"areal_jax: error: {error}", file=sys.stderr)
        return 2
    return session.run(config, plan["workdir"])


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
