"""Take the picture of a report's page that README shows: `python scripts/report_picture.py PAGE PICTURE`.

Needs Chromium (Debian: `apt-get install chromium-headless-shell`). PAGE is `OUTPUT/report/index.html`; the picture is
the upper part of the page, 1,200 pixels wide, with 64 colors.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1200, 1000


def main(argv: list[str] | None = None) -> int:
    """Write the picture; return 0, or 2 if there is no browser or no page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None or not args.page.is_file():
        missing = args.page if browser else f"a browser ({', '.join(BROWSERS)})"
        print(f"error: {missing}: not found", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        command = [browser, *options, f"--screenshot={raw}", args.page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        Image.open(raw).convert("RGB").quantize(64).save(args.picture, optimize=True)
    print(f"{args.picture}: {args.picture.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
