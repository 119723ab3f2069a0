import pytest

from tools.faults.harness import run


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """Shared by all test processes: only the first run compiles."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "faults-compiled"
    folder.mkdir(exist_ok=True)
    return str(folder)


@pytest.fixture
def survives(tmp_path, compile_cache):
    """Runs with a fault; the outcome must be as if nothing had been."""

    def try_it(fault, seed=0):
        outcome = run(fault, tmp_path / "x", seed, compile_cache)
        assert outcome.problems == [], outcome
        return outcome

    return try_it
