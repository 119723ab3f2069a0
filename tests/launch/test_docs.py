import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_settings_is_current():
    done = subprocess.run([sys.executable, "tools/make_config_docs.py", "--check"], cwd=ROOT, timeout=120)
    assert done.returncode == 0, "docs/config.md is not current: run python tools/make_config_docs.py"


def test_every_setting_has_a_meaning_or_a_telling_name():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    silent = [row[1].strip() for row in rows if not row[3].strip()]
    assert len(rows) > 80 and len(silent) < len(rows) / 3, silent


def test_every_file_and_test_that_the_architecture_page_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing, named = [], re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\w)?)(?:::(\w+))?`", page)
    for path, test in named:
        places = [ROOT / "areal_jax" / path, ROOT / "tests" / path, ROOT / path]
        found = [place for place in places if place.exists()]
        if path.startswith("DIR/") or (found and not test) or any(f"def {test}(" in p.read_text() for p in found):
            continue
        missing.append(f"{path}::{test}" if test else path)
    assert len(named) > 40 and not missing, missing
