"""Take screenshots of the built site: desktop and phone, light and dark.

``python tests/screenshots.py [SITE] [PAGE …]`` writes ``_build/screenshots/*.png`` and prints what
is wider than the screen, which a reader on a phone would have to scroll for.
"""

from __future__ import annotations

import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import chromium

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"desktop": (1360, 900), "phone": (390, 844)}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the terminal readable."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; yield its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def shoot(site: Path, pages: list[str], out: Path) -> int:
    """Write every picture; return how many pages are wider than the screen."""
    out.mkdir(parents=True, exist_ok=True)
    too_wide = 0
    with served(site) as base:
        for size, (width, height) in SIZES.items():
            for mode in ("light", "dark"):
                context = {
                    "viewport": {"width": width, "height": height},
                    "color_scheme": mode,
                    "is_mobile": size == "phone",
                    "has_touch": size == "phone",
                    "device_scale_factor": 1,
                }
                with chromium(**context) as (page, refused):
                    page.add_init_script(f"localStorage.setItem('mode', '{mode}')")
                    for name in pages:
                        page.goto(f"{base}/{name}.html")
                        page.wait_for_load_state("networkidle")
                        page.wait_for_timeout(700)
                        extent = page.evaluate("document.documentElement.scrollWidth")
                        if extent > width:
                            too_wide += 1
                            print(f"{name} {size}: {extent} px wide on a {width} px screen")
                        target = out / f"{name}-{size}-{mode}.png"
                        page.screenshot(path=target, full_page=True)
                    for url in refused:
                        print(f"asked another server: {url}")
    return too_wide


def main() -> int:
    """Shoot the pages named, or all of them."""
    arguments = sys.argv[1:]
    site = Path(arguments[0]) if arguments else ROOT / "_build" / "html"
    skip = {"genindex", "search", "index"}
    pages = arguments[1:] or sorted(p.stem for p in site.glob("*.html") if p.stem not in skip)
    out = ROOT / "_build" / "screenshots"
    wide = shoot(site, pages, out)
    print(f"{len(list(out.glob('*.png')))} pictures in {out}")
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
