"""Makes docs/images/report.png: what `kaleidoscope simulate` writes, in headless Chromium. `make screenshot`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGE = Path(__file__).parent / "images" / "report.png"
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    """Simulate in a temporary folder and take the picture."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("docs/screenshot.py needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kaleidoscope", "simulate", "--out", folder, "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        options = [*QUIET, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        options += ["--window-size=1000,1150", f"--screenshot={IMAGE}", f"file://{folder}/report.html"]
        IMAGE.parent.mkdir(exist_ok=True)
        subprocess.run([chromium, *options], check=True, capture_output=True)


if __name__ == "__main__":
    main()
