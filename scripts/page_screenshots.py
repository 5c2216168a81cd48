"""Pictures of the server's page for the docs: docs/images/page_{light,dark,phone}.png.

The server behind it is the tests' stand-in without a model: its speeds and answers mean nothing.
Needs the `test` extra and a Chromium on the PATH.
"""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import browser  # noqa: E402
from fake_server import Knobs, running  # noqa: E402

SIZES = {"light": (1200, 1010), "dark": (1200, 1010), "phone": (360, 1180)}
COLORS = 128
ANSWERS = {
    "Which risks does the report name?": "Three: a supplier that may fail to deliver in spring, "
    "a lawsuit over the older licences, and the cost of moving two data centres.\n\n"
    "The second is called the largest (section 4.2).",
    "What changed since last year?": "Revenue grew by 12 %, and the board has two new members.",
}


def main() -> None:
    knobs = Knobs(
        model="example-model", tokens=131_072, block_size=16_384, answers=ANSWERS, pause=0.05
    )
    with running(knobs) as url, browser.chromium() as chromium:
        for name, (width, height) in SIZES.items():
            page = chromium.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if name == "dark" else "light",
                reduced_motion="reduce",
            )
            page.goto(url)
            knobs.contexts.clear()
            if name == "light":
                add(page, "minutes-2025.txt")
            if name == "dark":
                knobs.sources = ("gpu", "new", "new", "host", "new", "new", "new", "disk")
                knobs.gate.clear()
            add(page, "annual-report.txt")
            if name == "dark":
                page.wait_for_timeout(600)
            else:
                page.locator("#numbers", has_text="read in").wait_for()
                page.check("#by-line")
                page.fill("#question", "\n".join(ANSWERS))
                page.click("#ask-button")
                page.locator("[aria-busy=false] + [aria-busy=false]").wait_for()
                page.uncheck("#by-line")
            if name == "phone":
                page.locator("#name").scroll_into_view_if_needed()
                page.evaluate("document.getElementById('name').scrollIntoView()")
            path = ROOT / "docs" / "images" / f"page_{name}.png"
            page.screenshot(path=path)
            knobs.gate.set()
            knobs.sources = ("new",)
            page.close()
            Image.open(path).convert("RGB").quantize(COLORS).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


def add(page, name: str) -> None:
    text = f"{name} " * 30_000
    file = {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
    page.set_input_files("#files", [file])


if __name__ == "__main__":
    main()
