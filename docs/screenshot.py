"""Makes docs/images/{report,attribution}.png: reports of a simulated log, in headless Chromium. `make screenshot`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    """Simulate in a temporary folder, attribute what was simulated, and take the pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("docs/screenshot.py needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        _kaleidoscope("simulate", "--out", folder)
        _kaleidoscope(
            "attribute", str(made / "log.parquet"), "--schema", str(made / "schema.yaml"),
            "--out", str(made / "attribution"), "--simulated",
        )  # fmt: skip
        _picture(chromium, made / "report.html", "report.png", (1000, 1150))
        _picture(chromium, made / "attribution" / "report.html", "attribution.png", (1160, 1500))


def _kaleidoscope(*arguments: str) -> None:
    command = [sys.executable, "-m", "kaleidoscope", *arguments, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _picture(chromium: str, page: Path, image: str, size: tuple[int, int]) -> None:
    """The top of a page; `size` is (width, height) in pixels."""
    options = [*QUIET, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={page.parent}/profile"]
    options += [f"--window-size={size[0]},{size[1]}", f"--screenshot={IMAGES / image}", page.resolve().as_uri()]
    IMAGES.mkdir(exist_ok=True)
    subprocess.run([chromium, *options], check=True, capture_output=True)


if __name__ == "__main__":
    main()
