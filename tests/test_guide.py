"""The guide is followed word for word, as a new operator would: its bash blocks run, and say what it says they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide-first-scene.md"
END = "--- end of block"


def steps(text: str) -> list[tuple[str, list[str]]]:
    """Every bash block, with the lines that the block of text after it promises."""
    blocks = re.findall(r"^```bash\n(.*?)^```\n(?:```text\n(.*?)^```$)?", text, flags=re.MULTILINE | re.DOTALL)
    return [(script, promised.splitlines()) for script, promised in blocks]


def matches(promised: str, line: str) -> bool:
    """Whether a line is what was promised; … stands for anything, and so does any width of a gap."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in promised.split("…")]
    pattern = r"\s*.*\s*".join(parts)
    return re.fullmatch(rf"\s*{pattern}\s*", line) is not None


def test_the_guide_does_what_it_says(tmp_path: Path) -> None:
    blocks = steps(GUIDE.read_text())
    assert len(blocks) == 11
    script = "".join(f"{commands}\necho '{END}'\n" for commands, _ in blocks)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KALEIDOSCOPE_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-u", "-c", script],
        cwd=tmp_path,
        env={**kept, "PATH": path, "EXAMPLE": str(ROOT / "examples" / "wealth")},
        capture_output=True,
        text=True,
        check=False,
    )
    outputs = done.stdout.split(f"{END}\n")
    assert done.returncode == 0, f"after block {len(outputs) - 1}: {done.stderr}"
    assert "Traceback" not in done.stderr
    for (commands, promised), output in zip(blocks, outputs, strict=False):
        lines = iter(output.splitlines())
        for promise in promised:
            # `in` on an iterator goes on from where it stopped: the lines have to come in this order.
            assert any(matches(promise, line) for line in lines), (
                f"{promise!r} is not (in order) in:\n{commands}\n{output}"
            )


def test_every_block_promises_something() -> None:
    assert all(promised for _, promised in steps(GUIDE.read_text()))


@pytest.mark.parametrize("name", ["materials.csv", "scene.yaml", "plan.yaml", "layouts", "images", "make_images.py"])
def test_the_example_is_there(name: str) -> None:
    assert (ROOT / "examples" / "wealth" / name).exists()


def test_the_pictures_are_small() -> None:
    pictures = list((ROOT / "examples" / "wealth" / "images").glob("*.webp"))
    assert len(pictures) == 10
    assert sum(picture.stat().st_size for picture in pictures) < 300_000
