"""The built site in Chromium: it asks no other server, its widgets move, and it fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from site_build import need_browser, site, site_url  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.browser, pytest.mark.book, pytest.mark.usefixtures("need_browser")]

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """One browser for this file."""
    with browser.launched() as started:
        yield started


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def tab(request: pytest.FixtureRequest, running: Any) -> tuple[Any, list[str], list[str]]:
    """(page, requests refused, script errors) at one screen size."""
    page, refused = browser.new_tab(running, **request.param)
    errors: list[str] = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    return page, refused, errors


def names(site: Path) -> list[str]:  # noqa: F811
    """Pages that a reader opens."""
    return sorted(p.stem for p in site.glob("*.html") if p.stem not in {"genindex", "index"})


def with_widgets(site: Path) -> list[str]:  # noqa: F811
    """Pages that show a widget."""
    return [n for n in names(site) if "widget-view+json" in (site / f"{n}.html").read_text()]


def open_page(page: Any, address: str) -> None:
    """Open a page and wait until its scripts have loaded."""
    page.goto(address)
    page.wait_for_load_state("networkidle")
    if page.locator("script[type='application/vnd.jupyter.widget-view+json']").count():
        page.wait_for_selector(".ch15-explorer svg[role=img], .ch15-grid img", state="attached")


def test_every_page(tab: Any, site: Path, site_url: str) -> None:  # noqa: F811
    page, refused, errors = tab
    without_alt = "all => all.filter(i => !i.alt.trim()).map(i => i.src.slice(0, 80))"
    unnamed = "all => all.filter(i => !i.getAttribute('aria-label')).length"
    for name in names(site):
        open_page(page, f"{site_url}/{name}.html")
        assert not refused, f"{name} asked another server"
        assert not errors, f"{name}: script errors"
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} px wider than the screen"
        assert not page.eval_on_selector_all(".bd-article img", without_alt), f"{name}: no alt text"
        assert page.eval_on_selector_all(".ch15-explorer input", unnamed) == 0
        assert page.locator("html").get_attribute("lang") == "en"


def test_mathematics_is_set_locally(tab: Any, site_url: str) -> None:  # noqa: F811
    page = tab[0]
    open_page(page, f"{site_url}/demo.html")
    page.wait_for_selector("mjx-container mjx-math")
    page.wait_for_function("document.fonts.check('16px MJXTEX')")


def test_formula_explorers_move(tab: Any, site: Path, site_url: str) -> None:  # noqa: F811
    page = tab[0]
    moved = 0
    for name in with_widgets(site):
        open_page(page, f"{site_url}/{name}.html")
        for explorer in page.locator(".ch15-explorer").all():
            explorer.scroll_into_view_if_needed()
            assert explorer.locator(".fault").count() == 0
            slider = explorer.locator("input[type=range]").first
            picture = explorer.locator(".chart svg[role=img]")
            before, said = picture.inner_html(), slider.get_attribute("aria-valuetext")
            box = slider.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2, steps=4)
            page.mouse.up()
            assert slider.get_attribute("aria-valuetext") != said
            assert picture.inner_html() != before, f"{name}: the picture did not follow"
            moved += 1
    assert moved >= 3


def test_explorer_by_keyboard_and_by_dragging_in_the_chart(tab: Any, site_url: str) -> None:  # noqa: F811
    page = tab[0]
    open_page(page, f"{site_url}/demo.html")
    explorer = page.locator(".ch15-explorer").first
    number = explorer.locator("dd[data-name=now]")
    assert number.inner_text() == "737,280 KiB"
    explorer.locator("input[name=batch]").focus()
    page.keyboard.press("ArrowRight")
    assert number.inner_text() == "1,105,920 KiB"
    context = explorer.locator("input[name=context]")
    before = context.get_attribute("aria-valuetext")
    explorer.locator(".chart").scroll_into_view_if_needed()
    box = explorer.locator(".chart svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    assert context.get_attribute("aria-valuetext") != before


def visible_picture(grid: Any) -> str:
    """Alternative text of the one picture of a grid that is shown."""
    shown = [i for i in grid.locator("img").all() if i.is_visible()]
    assert len(shown) == 1
    return str(shown[0].get_attribute("alt"))


def test_grids_move(tab: Any, site: Path, site_url: str) -> None:  # noqa: F811
    page = tab[0]
    moved = 0
    for name in with_widgets(site):
        open_page(page, f"{site_url}/{name}.html")
        for grid in page.locator(".ch15-grid").all():
            for handle in grid.locator(".noUi-handle").all():
                handle.scroll_into_view_if_needed()
                before = visible_picture(grid)
                handle.focus()
                page.keyboard.press("ArrowLeft")
                if visible_picture(grid) == before:  # it stood at the left end
                    page.keyboard.press("ArrowRight")
                page.wait_for_timeout(100)
                assert visible_picture(grid) != before, f"{name}: the picture did not follow"
                moved += 1
    assert moved >= 2


def test_dragging_a_grid_slider(tab: Any, site_url: str) -> None:  # noqa: F811
    page = tab[0]
    open_page(page, f"{site_url}/demo.html")
    grid = page.locator(".ch15-grid").first
    grid.scroll_into_view_if_needed()
    before = visible_picture(grid)
    track = grid.locator(".noUi-target").first.bounding_box()
    handle = grid.locator(".noUi-handle").first.bounding_box()
    y = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(track["x"] + 2, y, steps=6)
    page.mouse.up()
    page.wait_for_timeout(150)
    assert before == "Line at batch 4, context 512"
    assert visible_picture(grid) == "Line at batch 1, context 512"


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_contrast_in_both_modes(running: Any, site_url: str, mode: str) -> None:  # noqa: F811
    measure = """all => all.map(e => {
      const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const lum = c => rgb(c).map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
      ).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
      let up = e, back = 'rgba(0, 0, 0, 0)';
      while (up && back.endsWith(' 0)')) {
        back = getComputedStyle(up).backgroundColor; up = up.parentElement;
      }
      const [a, b] = [lum(getComputedStyle(e).color), lum(back)].sort((x, y) => y - x);
      return [e.className || e.tagName, (a + 0.05) / (b + 0.05)];
    })"""
    page, _ = browser.new_tab(running, **DESKTOP)
    page.add_init_script(f"localStorage.setItem('mode', '{mode}')")
    open_page(page, f"{site_url}/demo.html")
    assert page.locator("html").get_attribute("data-theme") == mode
    places = (
        ".bd-article p, .bd-article h1, .ch15-explorer .what, .ch15-explorer .value, "
        ".ch15-explorer dt, .ch15-explorer dd, .ch15-explorer .legend span, "
        ".ch15-grid label, .ch15-grid .widget-readout, .ch15-figure figcaption"
    )
    ratios = page.eval_on_selector_all(places, measure)
    assert len(ratios) > 10
    assert not [r for r in ratios if r[1] < 4.5], "text is hard to read"
