"""The HTML page: what its text holds, and how it behaves in headless Chromium."""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from test_report import layer, report_of

from jaxeff.metrics._curve import CELLS, Distribution
from jaxeff.report import page

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no `chromium` and `chromedriver` on this machine"
)
NASTY = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    '"onclick="alert(3)" x="',
    "'><img src=x onerror=alert(4)>",
    "a&amp;b/]]>/{{ 7*7 }}/${7}",
    "\u202egnol/\u2028\ud800",
)


def _distribution(index):
    weights = np.zeros(CELLS, np.float32)
    weights[20 + index % 20 : 50] = 1
    return Distribution(weights / weights.sum(), weights**2 / weights.sum())


def _report(count):
    """Stacking a thousand layers one by one takes longer than all the rest: one layer is repeated."""
    one = report_of(layer("x", (512, 300), distribution=_distribution(0)))
    numbers = jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=-1), one.numbers)
    utilization = (0.3 + 0.4 * (np.arange(count) % 7) / 7).astype(np.float32)
    return dataclasses.replace(
        one,
        structure=tuple(
            dataclasses.replace(one.structure[0], path=f"block_{i}/dense/kernel") for i in range(count)
        ),
        numbers=dataclasses.replace(
            numbers, metrics=dataclasses.replace(numbers.metrics, utilization=utilization)
        ),
        units=tuple(np.random.default_rng(0).random((count, 300), np.float32)),
        activities=one.activities * count,
    )


def _page(report):
    return page.render(report.snapshot())


# The text


def test_it_is_one_file_that_loads_nothing(tmp_path):
    report = report_of(layer())
    report.to_html(tmp_path / "report.html", title="Mine")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in text and [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "default-src 'none'" in text and "unsafe-inline" not in text
    assert not re.search(r'\b(src|href|action)="(?!#)', text)
    assert set(re.findall(r"\w+://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}
    # Neither would the policy let through.
    assert not re.search(r"<[^>]* (style|on\w+)=", re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S))


def test_names_stay_text_wherever_they_stand():
    rows = [layer(name, dead=2, utilization=0.2, reason=name, activity=None) for name in NASTY]
    rows += [layer(name + "/b", dead=2, utilization=0.2) for name in NASTY]
    text = _page(report_of(*rows))
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert "<!--" not in text and 'onclick="' not in text
    # The template's own language is not spoken in names either.
    assert "{{ 7*7 }}" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    assert [each["path"] for each in data["layers"]][:6] == list(NASTY)[:6]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [layer(utilization=math.nan, gini=math.nan, effective_params=math.nan, nonfinite=3)],
        [layer(null=None, activity=None, macs=None, nonlinearity=None, scored="magnitude")],
        [layer(units=np.full(32, np.nan, np.float32))],
        [layer(units=np.zeros(32, np.float32), utilization=0.0, effective_params=0.0, max=0.0)],
        [layer("query", (8, 4, 16), unit_axes=(1, 2), units=np.ones((4, 16), np.float32))],
        [layer("embedding", (10, 70_000))],
    ],
    ids=["no layer", "all nan", "no null", "nan units", "all zero", "heads", "many units"],
)
def test_every_report_has_a_page(rows):
    text = _page(report_of(*rows))
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', text, re.S).group(1)
    assert text.count('class="open"') == len(rows)


def test_two_hundred_layers_stay_below_two_megabytes():
    assert len(_page(_report(200)).encode()) < 2e6


def test_a_report_of_several_models_says_how_to_take_one():
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[report_of(layer())] * 2)
    with pytest.raises(ValueError, match="take one first"):
        _ = _page(both)


def test_without_jinja_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match="pip install jinja2"):
        report_of(layer()).to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a report's page at a width; afterwards nothing may have been logged."""

    def open_(report, width=1400):
        report.to_html(tmp_path / "report.html")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get((tmp_path / "report.html").as_uri())
        return browser

    yield open_
    assert browser.get_log("browser") == []


def _shown(browser, column):
    """The texts of a column, from 0, in the rows that are shown, in one call."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#table > tbody > tr[data-index]')].filter(row => !row.hidden)"
        f".map(row => row.cells[{column}].textContent.trim())"
    )


@in_chromium
def test_headers_sort_both_ways_and_say_so(open_page):
    report = report_of(
        layer("b10/kernel", gini=0.5), layer("b9/kernel", gini=0.9), layer("a/kernel", gini=math.nan)
    )
    browser = open_page(report)
    header = browser.find_element(By.CSS_SELECTOR, "button[data-key=gini]")
    column = 9
    assert _shown(browser, column) == ["0.500", "0.900", "?"]
    header.click()
    assert _shown(browser, column) == ["0.900", "0.500", "?"]
    heading = browser.find_element(By.CSS_SELECTOR, "th:has(> button[data-key=gini])")
    assert heading.get_attribute("aria-sort") == "descending"
    header.click()
    assert _shown(browser, column) == ["0.500", "0.900", "?"]
    assert heading.get_attribute("aria-sort") == "ascending"
    browser.find_element(By.CSS_SELECTOR, "button[data-key=path]").click()
    assert [text.split("\n")[0] for text in _shown(browser, 1)] == ["a/kernel", "b9/kernel", "b10/kernel"]
    assert heading.get_attribute("aria-sort") == "none"
    browser.find_element(By.CSS_SELECTOR, "button[data-key=index]").click()
    assert _shown(browser, 0) == ["1", "2", "3"]


@in_chromium
def test_the_box_filters_by_every_word(open_page):
    browser = open_page(report_of(layer("a/query"), layer("a/key", nonlinearity="gelu"), layer("b/query")))
    box = browser.find_element(By.ID, "filter")
    for words, left in (("query", 2), (" a QUERY ", 1), ("gelu", 1), ("nothing", 0)):
        box.clear()
        box.send_keys(words)
        assert len(_shown(browser, 0)) == left
        assert browser.find_element(By.ID, "count").text == f"{left} of 3 layers"


@in_chromium
def test_a_layer_opens_with_its_curves_units_and_numbers(open_page):
    units = np.arange(32, dtype=np.float32)
    browser = open_page(report_of(layer("a/kernel", units=units, dead=2, distribution=_distribution(3))))
    button = browser.find_element(By.CSS_SELECTOR, "button.open")
    assert browser.find_elements(By.CLASS_NAME, "detail") == []
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    detail = browser.find_element(By.ID, button.get_attribute("aria-controls"))
    drawn = detail.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    titles = [svg.find_element(By.TAG_NAME, "title").get_attribute("textContent") for svg in drawn]
    assert [title.split()[0] for title in titles] == ["Lorenz", "Histogram", "Importance"]
    assert "20.0 %, 50.0 %, 60.0 %" in titles[0] and "number 32" in titles[2]
    assert len(drawn[2].find_elements(By.CSS_SELECTOR, ".map-high")) == 32
    assert len(drawn[2].find_elements(By.CSS_SELECTOR, ".cross")) == 2
    assert len(drawn[1].find_elements(By.CSS_SELECTOR, ".bars")) == np.count_nonzero(_distribution(3).weights)
    assert "2,048" in detail.text
    button.click()
    assert not detail.is_displayed()


@in_chromium
def test_nothing_that_a_name_says_is_run(open_page):
    rows = [layer(name, dead=2, utilization=0.2) for name in NASTY]
    browser = open_page(report_of(*rows))
    browser.execute_script("document.querySelectorAll('button.open').forEach(button => button.click())")
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert browser.find_elements(By.CSS_SELECTOR, "img, [onclick], [onerror]") == []
    shown = browser.execute_script("return document.querySelector('button.open').textContent")
    assert shown == NASTY[0]


@in_chromium
@pytest.mark.parametrize("width", [400, 800, 1200, 1400])
def test_nothing_lies_beside_the_window(open_page, width):
    blocks = [layer(f"{'encoder/' * 9}block{i}/kernel", utilization=0.4 + i / 99) for i in range(25)]
    browser = open_page(report_of(layer("a" * 300), layer("encoder/" * 30 + "kernel"), *blocks), width)
    browser.find_element(By.CSS_SELECTOR, "button.unfold").click()
    browser.execute_script("document.querySelectorAll('button.open').forEach(button => button.click())")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("#filter", "button[data-key=used]", "button.open", "svg.bar"):
        box = browser.find_element(By.CSS_SELECTOR, selector).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 20
    cut = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].filter(text => {"
        "const [inner, outer] = [text, text.ownerSVGElement].map(each => each.getBoundingClientRect());"
        "return inner.left < outer.left || inner.right > outer.right || inner.bottom > outer.bottom;"
        "}).map(text => text.textContent)"
    )
    assert cut == []


A4 = 718  # pixels between the margins that browsers leave


@in_chromium
def test_paper_has_no_controls_and_cuts_nothing(open_page):
    wide = layer("encoder/" * 30 + "kernel", (3, 3, 3, 1024, 2048), nonlinearity="hard_sigmoid", dead=3)
    browser = open_page(report_of(wide, layer("a/kernel")), A4)
    browser.find_element(By.CSS_SELECTOR, "button.open").click()
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    for selector in ("#filter", ".tools label", ".arrow", ".skip", "p > .hint"):
        assert not browser.find_element(By.CSS_SELECTOR, selector).is_displayed(), selector
    for selector in ("#count", ".detail svg", "td.wide", "details table"):
        assert browser.find_element(By.CSS_SELECTOR, selector).is_displayed(), selector
    assert browser.find_element(By.TAG_NAME, "html").value_of_css_property("background-color") == (
        "rgba(255, 255, 255, 1)"
    )
    ends = browser.execute_script(
        "return [...document.querySelectorAll('table, td, svg')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(ends) <= A4
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not browser.find_element(By.CSS_SELECTOR, "details table").is_displayed()


@in_chromium
def test_a_screen_reader_finds_names_and_roles(open_page):
    browser = open_page(report_of(layer("a/kernel"), layer("b/kernel")))
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored")
    ]
    names = {role: [name for other, name in found if other == role] for role, _ in found}
    assert names["heading"][0] == "jaxeff report" and "main" in names and "table" in names
    assert names["searchbox"] == ["Filter by name, shape or nonlinearity"]
    assert "2 of 2 layers" in str(found) and "status" in names
    assert len(names["columnheader"]) == 13 and len(names["rowheader"]) == 2
    assert all(name for role in ("image", "img", "button", "link") for name in names.get(role, []))
    assert browser.execute_script("return document.documentElement.lang") == "en"


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_page, scheme):
    browser = open_page(report_of(layer()))
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colors = browser.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['paper', 'panel', 'ink', 'soft', 'blue', 'orange', 'green']"
        ".map(name => [name, s.getPropertyValue('--' + name).trim()]))"
    )
    for ground in ("paper", "panel"):
        for text in ("ink", "soft", "blue", "orange"):
            assert _contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


def _contrast(one, other):
    """WCAG 2.2, 1.4.3."""

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@in_chromium
def test_a_thousand_layers_sort_and_filter(open_page):
    browser = open_page(_report(1000))
    browser.find_element(By.ID, "blocks").click()
    browser.find_element(By.CSS_SELECTOR, "button[data-key=used]").click()
    used = [float(text.split("%")[0]) for text in _shown(browser, 7)]
    assert len(used) == 1000 and used == sorted(used, reverse=True)
    browser.find_element(By.ID, "filter").send_keys("block_99")
    assert len(_shown(browser, 0)) == 11


@in_chromium
def test_blocks_that_are_alike_open_by_a_click(open_page):
    rows = [
        layer(f"block{i}/{name}", gini=0.2 + i / 20) for i in range(8) for name in ("key", "query", "value")
    ]
    browser = open_page(report_of(*rows, layer("head", gini=0.3)))
    stacks = browser.find_elements(By.CSS_SELECTOR, "tr.stack")
    assert [stack.find_element(By.TAG_NAME, "button").text for stack in stacks] == [
        f"block0–7/{name}" for name in ("key", "query", "value")
    ]
    assert "0.200–0.550" in stacks[1].text and "8 layers" in stacks[1].text
    paths = lambda: [text.split("\n")[0] for text in _shown(browser, 1)]  # noqa: E731
    assert paths() == ["head"]
    stacks[1].find_element(By.TAG_NAME, "button").click()
    assert paths() == [*(f"block{i}/query" for i in range(8)), "head"]
    # Stacks sort by their mean, here 0.375, and their members beneath them.
    browser.find_element(By.CSS_SELECTOR, "button[data-key=gini]").click()
    assert paths() == [*(f"block{i}/query" for i in reversed(range(8))), "head"]
    browser.find_element(By.ID, "filter").send_keys("block3/")
    assert paths() == [f"block3/{name}" for name in ("key", "query", "value")]
    assert browser.find_element(By.ID, "count").text == "3 of 25 layers"
    browser.find_element(By.ID, "filter").clear()
    browser.find_element(By.ID, "filter").send_keys("e")
    browser.find_element(By.ID, "blocks").click()
    assert len(paths()) == 25 and not any(stack.is_displayed() for stack in stacks)


@in_chromium
def test_a_link_to_a_folded_layer_opens_its_stack(open_page):
    rows = [layer(f"block{i}/kernel", utilization=0.1 if i == 11 else 0.7) for i in range(25)]
    browser = open_page(report_of(*rows))
    assert _shown(browser, 1) == []
    browser.find_element(By.CSS_SELECTOR, "a[data-open='11']").click()
    assert len(_shown(browser, 1)) == 25 and browser.find_element(By.ID, "detail-11").is_displayed()
