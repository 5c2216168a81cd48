"""Pictures of the server's page for the docs: docs/images/page_{light,dark,phone}.png.

The engine behind it is the tests', without a model: its speeds and answers mean nothing. Needs the
`test` extra and a Chromium on the PATH.
"""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

from browser import chromium  # noqa: E402
from page_engine import running  # noqa: E402

SIZES = {"light": (1200, 1010), "dark": (1200, 800), "phone": (360, 1180)}
COLORS = 128
TEXT = 8 * 16_384 - 8  # bytes; with the template's, eight blocks
ANSWERS = {
    "Which risks does the report name?": "Three: a supplier that may fail to deliver in spring, "
    "a lawsuit over the older licences, and the cost of moving two data centres.\n\n"
    "The second is called the largest (section 4.2).",
    "What changed since last year?": "Revenue grew by 12 %, and the board has two new members.",
}


def main() -> None:
    with chromium() as browser:
        for name, size in SIZES.items():
            path = ROOT / "docs" / "images" / f"page_{name}.png"
            with running() as server:
                page = browser.new_page(
                    viewport=dict(zip(("width", "height"), size, strict=True)),
                    color_scheme="dark" if name == "dark" else "light",
                    reduced_motion="reduce",
                )
                page.goto(server.url)
                server.engine.block = 16_384
                server.engine.answers = ANSWERS
                (reading if name == "dark" else answered)(page, server.engine)
                page.screenshot(path=path)
                page.close()
                server.engine.gate.set()
            Image.open(path).convert("RGB").quantize(COLORS).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


def reading(page, engine) -> None:
    """In the middle of phase 1, some blocks from caches."""
    add(page, "minutes-2025.txt", 40_000)
    engine.sources = ("gpu", "new", "new", "host", "new", "new", "new", "disk")
    engine.gate.clear()
    page.set_input_files("#files", [text_file("annual-report.txt", TEXT)])
    page.wait_for_timeout(800)


def answered(page, engine) -> None:
    """Two answers at once."""
    add(page, "minutes-2025.txt", 40_000)
    add(page, "annual-report.txt", TEXT)
    page.check("#by-line")
    page.fill("#question", "\n".join(ANSWERS))
    page.click("#ask-button")
    page.locator("[aria-busy=false] + [aria-busy=false]").wait_for()
    page.uncheck("#by-line")
    page.evaluate("innerWidth < 500 && document.getElementById('name').scrollIntoView()")


def add(page, name: str, size: int) -> None:
    page.set_input_files("#files", [text_file(name, size)])
    page.locator("#name", has_text=name).wait_for()
    page.locator("#numbers", has_text="read in").wait_for()


def text_file(name: str, size: int) -> dict:
    return {"name": name, "mimeType": "text/plain", "buffer": b"x" * size}


if __name__ == "__main__":
    main()
