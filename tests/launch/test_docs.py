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
