"""Nothing of ours runs code that it was sent: no serializer that can is imported or reached anywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
# Names that pickle behind the scenes, wherever they come from.
CALLS = {
    "send_pyobj", "recv_pyobj", "ProcessPoolExecutor", "SocketHandler", "DatagramHandler", "BaseManager", "read_pickle",
    "to_pickle",
}  # fmt: skip


def offences(source: str) -> list[str]:
    """What in `source` pickles, or may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.partition(".")[0] in MODULES | {"multiprocessing"}]
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] in MODULES or module.partition(".")[0] == "multiprocessing":
                    found += [f"{module}.{a.name}" for a in names]
                found += [a.name for a in names if a.name in CALLS]
            case ast.Attribute(attr=attr, value=value):
                found += [attr] if attr in CALLS else []
                if attr in ("load", "save") and isinstance(value, ast.Name) and value.id == "torch":
                    found.append(f"torch.{attr}")
            case ast.keyword(arg="allow_pickle", value=value):
                found += [] if isinstance(value, ast.Constant) and value.value is False else ["allow_pickle"]
            case ast.Call(func=ast.Name(id="__import__")):
                found.append("__import__")
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name))]):
                found += [name] if name.partition(".")[0] in MODULES else []
            case ast.Constant(value=str(text)) if "import" in text and "\n" in text:  # a program in a string
                lines = [line.split() for line in text.replace(",", " ").replace(";", " ").splitlines()]
                found += [m for line in lines if {"import", "from"} & set(line[:1]) for m in MODULES & set(line)]
    return found


@pytest.mark.parametrize("folder", ["areal_jax", "tools", "configs"])
def test_no_code_of_ours_pickles(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): wrong for path in files if (wrong := offences(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import multiprocessing as mp", "import marshal, os",
        "sock.recv_pyobj()", "np.load(path, allow_pickle=True)", "torch.load(path)", "__import__('pickle')",
        "importlib.import_module('dill')", "from concurrent.futures import ProcessPoolExecutor",
        "BOOT = '''\\nimport marshal, os\\n'''", "BOOT = '''\\nif 1:\\n    from marshal import load\\n'''",
    ],
)  # fmt: skip
def test_what_pickles_is_found(source):
    assert offences(source)


def test_what_does_not_is_left_alone():
    assert not offences("import json\nnp.load(path, allow_pickle=False)\nx = 'pickle'\ny = '''\nimport os\n'''")
