"""The HTML page used as a reader uses it, in headless Chromium."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from normexp.report.aggregate import rows_by_task
from normexp.report.html import report_html
from normexp.report.paper import load_paper
from normexp.runs.causality_record import CausalityRecord, load_causality_records
from normexp.runs.records import Record, load_records, record_path

webdriver = pytest.importorskip("selenium.webdriver")
ActionChains = webdriver.ActionChains
RESULTS = Path(__file__).resolve().parents[2] / "results"
RUN = "ptb_future-PN-published-seed1"
INJECTION = (
    """</script></style><img src=http://x.invalid/ onerror="hacked=1">'"><svg onload=hacked=1>"""
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"no {' and no '.join(missing)} (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    profile = tmp_path_factory.mktemp("profile")
    # --no-sandbox: without it Chromium refuses to run as root
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(option)
    for option in ("--no-first-run", "--disable-background-networking", "--disable-quic"):
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(programs["chromedriver"])
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Reader:
    """A browser with one page, and the actions of a reader."""

    def __init__(self, driver, path: Path) -> None:
        self.driver, self.path = driver, path

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def devtools(self, command: str, **parameters) -> None:
        self.driver.execute_cdp_cmd(command, parameters)

    def open(self, fragment: str = "") -> None:
        self.driver.get("about:blank")  # else only the fragment changes
        self.driver.get(self.path.as_uri() + fragment)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def column(self, table: str, number: int) -> list[str]:
        """Give the visible texts of a column."""
        cells = (
            f"return [...document.querySelector('{table}').querySelectorAll('tbody td, tbody th')]"
        )
        mine = f"(cell) => cell.cellIndex === {number - 1} && cell.checkVisibility()"
        return self.run(f"{cells}.filter({mine}).map((cell) => cell.innerText)")

    def top_of(self, element) -> float:
        """Give the distance from the top of the window in pixels."""
        return self.run("return arguments[0].getBoundingClientRect().top", element)

    def settle(self, holds) -> None:
        """Wait until the condition holds; fail after 20 seconds."""
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """What pages asked for since the last call; chrome:// is the browser's own first page."""
        entries = (json.loads(e["message"])["message"] for e in self.driver.get_log("performance"))
        urls = {
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        }
        return {url for url in urls if not url.startswith(("about:blank", "chrome:"))}


@pytest.fixture(scope="module")
def committed() -> str:
    """The page of the committed records."""
    return page_of(load_records(RESULTS), load_causality_records(RESULTS))


def page_of(records: dict[Path, Record], causality: dict[Path, CausalityRecord]) -> str:
    paper = load_paper(RESULTS / "paper.yaml")
    return report_html(rows_by_task(records), paper, causality, [], "2026-01-02T03:04:05+00:00")


@pytest.fixture
def reader(browser, committed, tmp_path) -> Iterator[Reader]:
    """Prepare the page of the committed records; a test can write another one."""
    path = tmp_path / "report.html"
    path.write_text(committed, encoding="utf-8")
    someone = Reader(browser, path)
    someone.devtools("Emulation.setDeviceMetricsOverride", **screen(1200))
    someone.complaints(), someone.requests()  # of the test before
    yield someone
    assert someone.complaints() == []
    assert {url.split(",")[0].split("#")[0] for url in someone.requests()} <= {
        path.as_uri(),
        "data:",
    }


def screen(width: int) -> dict:
    return {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}


def part_of(plot, update: int) -> float:
    """Where an update lies in a drawing, from 0 at its left end to 1 at its right one."""
    left, right = (float(plot.get_attribute(f"data-{end}")) for end in ("left", "right"))
    return (update - left) / (right - left)


FUTURE = "#task-ptb_future table"  # the first is that of the results


def test_a_column_is_sorted_by_its_numbers_with_mouse_and_keyboard(reader) -> None:
    reader.open()
    wall = "#task-ptb_future > .scroll:last-child table"
    heads = reader.find_all(f"{wall} thead th")
    place = [head.text.split("\u00a0")[0].strip() for head in heads].index("wall time")
    before = reader.column(wall, place + 1)
    records = [
        record for path, record in load_records(RESULTS).items() if "ptb_future" in str(path)
    ]
    expected = sorted(records, key=lambda record: record.wall_time_seconds)
    heads[place].find_element("tag name", "button").click()
    assert heads[place].get_attribute("aria-sort") == "ascending"
    names = [name.split(" ")[0] for name in reader.column(wall, 1)]
    assert names == [record.label for record in expected]
    assert sorted(reader.column(wall, place + 1)) == sorted(before)
    heads[place].find_element("tag name", "button").send_keys("\ue007")  # Enter
    assert heads[place].get_attribute("aria-sort") == "descending"
    names = [name.split(" ")[0] for name in reader.column(wall, 1)]
    assert names == [record.label for record in reversed(expected)]
    heads[0].find_element("tag name", "button").send_keys(" ")
    assert [head.get_attribute("aria-sort") for head in heads].count("ascending") == 1
    assert reader.column(wall, 1) == sorted(reader.column(wall, 1))


def test_what_is_empty_comes_last_either_way(reader) -> None:
    reader.open()
    table = "#task-ptb table"
    button = reader.find_all(f"{table} thead button")[1]  # test PPL per word, which two norms lack
    for reverse in (False, True):
        button.click()
        *numbers, first, last = reader.column(table, 2)
        values = [float(number.split(" ")[0]) for number in numbers]
        assert first == last == "—"
        assert values == sorted(values, reverse=reverse) and len(values) == 4


def test_rows_and_runs_are_filtered_and_counted(reader) -> None:
    reader.open()
    future = [record for record in load_records(RESULTS).values() if record.task == "ptb_future"]
    # The first table is that of most runs' budget.
    num_rows = len(
        {r.label for r in future if r.budget and r.budget.endswith("2 epochs, one CPU core")}
    )
    assert reader.find(f"{FUTURE} .count").text == f"{num_rows} rows"
    reader.find("#filter-norm option[value='power']").click()
    labels = ["PN-bounded-published ‡§", "PN-causal ‡", "PN-published ‡§", "PN-transformer ‡"]
    assert reader.column(FUTURE, 1) == labels
    assert reader.find(f"{FUTURE} .count").text == f"4 of {num_rows} rows"
    num_records = sum(record.norm == "power" for record in load_records(RESULTS).values())
    reader.settle(lambda: reader.find("#filtered").text.startswith(f"{num_records} of "))
    reader.find("#filter-text").send_keys("FUTURE bounded-")
    assert reader.column(FUTURE, 1) == labels[:1]
    assert reader.column("#task-ptb table", 1) == []
    assert reader.find("#filtered").text.startswith("1 of ")
    assert [run.text for run in reader.find_all("#runs h4") if run.is_displayed()] == labels[:1]
    drawn = reader.find_all("#task-ptb_future g[data-key]")
    (key,) = {part.get_attribute("data-key") for part in drawn if part.is_displayed()}
    head = reader.find(f"#task-ptb_future tr[data-key='{key}'] th")
    assert head.get_attribute("textContent") == labels[0]
    reader.find("#filter button").click()
    reader.settle(lambda: len(reader.column(FUTURE, 1)) == num_rows)
    assert reader.find(f"{FUTURE} .count").text == f"{num_rows} rows"
    reader.find("#filter-text").send_keys("there is no such word")
    assert reader.column(FUTURE, 1) == []
    assert reader.find(f"{FUTURE} .count").text == f"0 of {num_rows} rows"


def test_failures_are_found_by_their_status(reader, make_record) -> None:
    runs = [
        make_record(label="LN", norm="layer"),
        make_record(label="PN", seed=1),
        make_record(label="PN", seed=2, status="diverged", reason="NaN"),
        make_record(label="BN", norm="batch", status="failed", reason="out of memory"),
    ]
    records = {record_path(Path(), run): run for run in runs}
    reader.path.write_text(page_of(records, {}), encoding="utf-8")
    reader.open()
    rows_by_status = {}
    for status in ("complete", "diverged", "failed", "no runs"):
        reader.find_all("#filter-status option")[0].click()
        [choice] = [o for o in reader.find_all("#filter-status option") if o.text == status]
        choice.click()
        rows_by_status[status] = reader.column("#task-iwslt14 table", 1)
    assert rows_by_status == {
        "complete": ["LN", "PN"],
        "diverged": ["PN"],
        "failed": ["BN"],
        "no runs": [
            "PN-released",
            "PN-released-mt",
            "BN (Unified-Normalization)",
            "LN (Transformer-Clinic, Admin)",
            "LN (Transformer-Clinic, post-norm)",
            "LN (Transformer-Clinic, pre-norm)",
            "LN (Unified-Normalization)",
            "RBN (2022)",
            "UN (Unified-Normalization)",
        ],
    }


def test_a_curve_is_switched_off_and_on(reader) -> None:
    reader.open()
    chart = "#task-ptb_future .chart"
    line = reader.find(f"{chart} g[data-key=C] path")
    key = reader.find(f"{chart} g[data-key=C] text")
    box = reader.find(f"{chart} tr[data-key=C] input")
    assert line.is_displayed() and key.is_displayed()
    box.click()
    assert not line.is_displayed() and not key.is_displayed()
    assert reader.find(f"{chart} g[data-key=B] path").is_displayed()
    box.send_keys(" ")
    assert line.is_displayed() and key.is_displayed()


def test_the_cursor_reads_values_off_the_curves(reader) -> None:
    reader.open()
    chart = "#task-precision_multi30k .chart"
    plot = reader.find(f"{chart} .plot")
    reader.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    records = load_records(RESULTS)
    curves = [
        dict(record.curve)
        for record in records.values()
        if (record.task, record.label) == ("precision_multi30k", "PN-bfloat16")
    ]

    def expected(update: int) -> str:
        losses = [curve[update] for curve in curves]
        low, high = min(losses), max(losses)
        return f"{sum(losses) / len(losses):.4f} ({low:.4f} to {high:.4f})"

    def shown() -> tuple[str, str]:
        value = reader.find(f"{chart} tr[data-key=A] .at-cursor").text
        return reader.find(f"{chart} .cursor-head").text, value

    x = (part_of(plot, 800) - 0.5) * plot.size["width"]  # 780 is the nearest update
    ActionChains(reader.driver).move_to_element_with_offset(plot, x, 0).perform()
    assert shown() == ("at 780", expected(780))
    cursor = reader.find(f"{chart} .cursor")
    left = cursor.rect["x"] - plot.rect["x"]
    assert left == pytest.approx(part_of(plot, 780) * plot.size["width"], abs=2)
    # the drawing has the point of that update there
    [line] = reader.find_all(f"{chart} g[data-key=A] path[style*='fill: none']")
    points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", line.get_attribute("d"))
    view = float(reader.find(f"{chart} svg").get_dom_attribute("viewBox").split()[2])
    drawn = float(points[sorted(curves[0]).index(780)][0]) / view * plot.size["width"]
    assert left == pytest.approx(drawn, abs=2)
    plot.send_keys("\ue014")  # the right arrow
    assert shown() == ("at 1,040", expected(1040))
    for _ in range(9):
        plot.send_keys("\ue012")  # the left one
    assert shown() == ("at 260", expected(260))


def test_the_cursor_prefers_updates_that_most_curves_have(reader) -> None:
    """Runs of 6 epochs were validated at 1,800 updates, all of them at 1,816."""
    reader.open()
    plot = reader.find("#task-ptb_future .plot")
    reader.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    x = (part_of(plot, 1801) - 0.5) * plot.size["width"]
    ActionChains(reader.driver).move_to_element_with_offset(plot, x, 0).perform()
    assert reader.find("#task-ptb_future .cursor-head").text == "at 1,816"


def test_a_link_opens_the_run_it_leads_to(reader) -> None:
    for with_scripts in (True, False):
        reader.devtools("Emulation.setScriptExecutionDisabled", value=not with_scripts)
        try:
            reader.open(f"#{RUN}")
            run = reader.find(f"[id='{RUN}']")
            reader.settle(run.is_displayed)
            reader.settle(lambda run=run: 0 <= reader.top_of(run) < 800)
            assert "attention=published" in run.text
            assert len(reader.find_all("details[open]")) == 1
        finally:
            reader.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_a_number_leads_to_its_run_though_that_be_filtered_out(reader) -> None:
    reader.open()
    reader.find("#filter-text").send_keys("ptb judged")  # a verdict, which no run has
    assert reader.find("#filtered").text.startswith("0 of ")
    [*_, number] = reader.find_all("#task-ptb tr:not([hidden]) td a[href='#ptb-PN-seed1']")
    number.click()
    reader.settle(reader.find("[id='ptb-PN-seed1']").is_displayed)
    assert reader.find("#filter-text").get_property("value") == ""


def test_without_scripts_it_is_a_page_to_read(reader) -> None:
    reader.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        reader.open()
        assert not reader.find("#filter").is_displayed()
        assert not any(box.is_displayed() for box in reader.find_all("input, select, button"))
        assert reader.column(FUTURE, 2)[1] == "197.86 (n = 1)"
        lines = reader.find_all("g[data-key] path[style*='fill: none']")
        assert len([line for line in lines if line.is_displayed()]) >= 10
        assert reader.column("#task-ptb_future .legend", 7)[0] == "4.8056"
        summary = reader.find("#runs summary")
        summary.click()
        assert reader.find("#runs details .run").is_displayed()
    finally:
        reader.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_on_a_phone_only_tables_scroll_sideways(reader) -> None:
    reader.devtools("Emulation.setDeviceMetricsOverride", **screen(360))
    reader.open(f"#{RUN}")
    reader.settle(reader.find(f"[id='{RUN}']").is_displayed)
    reader.run("document.querySelectorAll('details').forEach((run) => (run.open = true))")
    assert reader.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    boxes = reader.find_all("section > .scroll")
    widths = [
        reader.run("return [arguments[0].scrollWidth, arguments[0].clientWidth]", b) for b in boxes
    ]
    assert all(inside <= 360 for _, inside in widths)
    assert any(whole > inside for whole, inside in widths)
    for box, (whole, inside) in zip(boxes, widths, strict=True):
        assert box.get_attribute("tabindex") == ("0" if whole > inside else "-1")


@pytest.mark.parametrize("width", [1280, 1920])
def test_no_table_is_cut_off_on_a_desk(reader, make_record, width: int) -> None:
    """Neither of the committed results nor of labels as long as file names may be."""
    long = "PN-norm.options.alpha_fwd=0.95-fairseq.optimization.lr=0.0015-and-more"
    curve = [(1, 3.0), (1000, 2.0)]
    runs = [
        make_record(label=label, norm=norm, seed=seed, curve=curve)
        for label, norm in (("LN", "layer"), (long, "power"), ("x" * 60, "batch"))
        for seed in (1, 2, 3)
    ]
    runs.append(make_record(seed=9, status="failed", reason="no space left on /" + "y" * 90))
    made_up = page_of({record_path(Path(), run): run for run in runs}, {})
    reader.devtools("Emulation.setDeviceMetricsOverride", **screen(width))
    for page in (reader.path.read_text(encoding="utf-8"), made_up):
        reader.path.write_text(page, encoding="utf-8")
        reader.open()
        assert reader.run("return document.documentElement.scrollWidth") <= width
        cut = reader.run(
            "return [...document.querySelectorAll('section > .scroll, .chart > .scroll')]"
            ".filter((box) => box.scrollWidth > box.clientWidth)"
            ".map((box) => box.getAttribute('aria-label') + ' of ' + box.closest('section').id)"
        )
        assert cut == []


def test_dark_where_the_reader_wants_it(reader) -> None:
    seen, drawn = {}, {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        reader.devtools("Emulation.setEmulatedMedia", features=[feature])
        reader.open()
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        seen[scheme] = reader.run(style)
        [line] = reader.find_all("#task-precision_toy g[data-key=A] path[style*='fill: none']")
        [label, *_] = reader.find_all("#task-precision_toy .plot g:not([data-key]) > text")
        drawn[scheme] = line.value_of_css_property("stroke"), label.value_of_css_property("fill")
    reader.devtools("Emulation.setEmulatedMedia", features=[])
    assert seen == {
        "light": ["rgb(255, 255, 255)", "rgb(27, 31, 36)"],
        "dark": ["rgb(20, 24, 29)", "rgb(230, 233, 236)"],
    }
    assert drawn == {
        "light": ("rgb(77, 90, 254)", "rgb(87, 96, 106)"),
        "dark": ("rgb(124, 116, 253)", "rgb(164, 173, 182)"),
    }


def test_the_keyboards_place_can_be_seen(reader) -> None:
    reader.open()
    reader.find("#filter-text").send_keys("\ue004")  # Tab: to the next field
    focused = reader.driver.switch_to.active_element
    assert focused.get_attribute("id") == "filter-norm"
    assert focused.value_of_css_property("outline-style") == "solid"
    assert focused.value_of_css_property("outline-width") == "3px"


def test_paper_shows_everything_and_no_controls(reader) -> None:
    reader.open()
    reader.devtools("Emulation.setEmulatedMedia", media="print")
    try:
        assert not any(one.is_displayed() for one in reader.find_all("form, nav, input"))
        assert (
            reader.find("#task-ptb_future .scroll").value_of_css_property("overflow-x") == "visible"
        )
        reader.devtools("Emulation.setDeviceMetricsOverride", **screen(1032))  # A4, across
        assert reader.run("return document.documentElement.scrollWidth") <= 1032
    finally:
        reader.devtools("Emulation.setEmulatedMedia", media="")


def test_text_of_records_runs_nothing(reader, make_record) -> None:
    run = make_record(
        label=INJECTION,
        reason=INJECTION,
        status="failed",
        command=INJECTION,
        config={INJECTION: INJECTION},
        sites={INJECTION: {"name": INJECTION}},
        curve=[(1, 3.0), (2, 2.0)],
    )
    reader.path.write_text(page_of({Path("a.json"): run}, {}), encoding="utf-8")
    reader.open()
    button = reader.find_all("#task-iwslt14 table thead button")[0]
    button.click()
    reader.find("#filter-text").send_keys("onerror")
    assert INJECTION in reader.column("#task-iwslt14 table", 1)
    assert reader.run("return window.hacked === undefined && !document.images.length")
