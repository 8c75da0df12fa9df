"""The HTML page holds what the Markdown page holds, linked to its records, and loads nothing."""

import base64
import dataclasses
import fcntl
import hashlib
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import lxml.html
import pytest

from normexp.report.aggregate import rows_by_task
from normexp.report.charts import DASHES
from normexp.report.colours import PALETTE
from normexp.report.html import TEMPLATES, report_html, unfinished_runs
from normexp.report.paper import Paper, load_paper
from normexp.runs.causality_record import CausalityRecord, load_causality_records
from normexp.runs.folder import LOCK
from normexp.runs.records import load_records, record_path, write_record

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "results"
SCRIPT = REPOSITORY / "scripts" / "report.py"
NO_PAPER = Paper(tasks={}, values=[], differences=[])
MADE_AT = "2026-01-02T03:04:05+00:00"
INJECTION = (
    """</script></style><img src=x onerror="hacked()">'"><svg onload=hacked()>{{ 7919 * 7927 }}"""
)


@pytest.fixture(scope="module")
def published_paper() -> Paper:
    return load_paper(RESULTS / "paper.yaml")


@pytest.fixture(scope="module")
def committed(published_paper) -> lxml.html.HtmlElement:
    """The page of the committed records."""
    rows = rows_by_task(load_records(RESULTS))
    return parsed(report_html(rows, published_paper, load_causality_records(RESULTS), [], MADE_AT))


def parsed(text: str) -> lxml.html.HtmlElement:
    return lxml.html.document_fromstring(text)


def page_of(*records, paper=NO_PAPER, causality=None, unfinished=()) -> lxml.html.HtmlElement:
    by_path = {record_path(Path("results"), record): record for record in records}
    return parsed(report_html(rows_by_task(by_path), paper, causality or {}, unfinished, MADE_AT))


def words(element) -> str:
    return " ".join(element.text_content().split())


def table(page, caption: str, section: str | None = None):
    inside = f"//section[@id='{section}']" if section else ""
    [found] = page.xpath(f"{inside}//table[starts-with(normalize-space(caption), '{caption}')]")
    return found


def body(found) -> list[list[str]]:
    return [[words(cell) for cell in row] for row in found.xpath("./tbody/tr")]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Head and lines of every table, without Markdown's escapes and links."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = []
        for line in block.strip().split("\n"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            plain = [re.sub(r"(?<!\\)\[(.*?)(?<!\\)\]\([^)]*\)", r"\1", cell) for cell in cells]
            lines.append([re.sub(r"\\(.)", r"\1", cell).strip() for cell in plain])
        found.append([lines[0], *lines[2:]])
    return found


def test_every_table_of_the_markdown_page_is_there_line_by_line(committed) -> None:
    shown = [
        [[words(cell) for cell in row] for row in found.xpath(".//tr")]
        for found in committed.xpath("//table[contains(@class, 'sortable')]")
    ]
    expected = markdown_tables((RESULTS / "README.md").read_text("utf-8"))
    assert len(expected) > 15
    for one in expected:
        width = len(one[0])  # differences have a column of links more
        assert any([line[:width] for line in other] == one for other in shown), one[0]


def test_what_the_markdown_page_says_of_the_numbers_is_there(committed) -> None:
    text = words(committed.body)
    markdown = (RESULTS / "README.md").read_text("utf-8")
    marks = re.findall(r"^- ([†‡§] .*(?:\n  .*)*)", markdown.split("##")[0], re.MULTILINE)
    meanings = re.findall(r"^What these perplexities mean: .*", markdown, re.MULTILINE)
    assert len(marks) == 3 and len(meanings) == 2
    for sentence in [*marks, *meanings]:
        assert " ".join(sentence.split()) in text
    num_records = len(list(RESULTS.glob("records/*/*.json")))
    assert "Made on 2026-01-02 03:04 UTC by python scripts/report.py --html" in text
    assert f"from {num_records} records (" in text


def test_links_lead_somewhere_and_every_record_is_linked(committed) -> None:
    ids = committed.xpath("//@id")
    assert len(ids) == len(set(ids))
    targets = {link.removeprefix("#") for link in committed.xpath("//a/@href")}
    assert targets <= set(ids)
    for path in RESULTS.glob("records/*/*.json"):
        assert f"{path.parent.name}-{path.stem}" in targets
    for path in RESULTS.glob("causality/*/*.json"):
        assert f"causality-{path.parent.name}-{path.stem}" in targets


def test_every_number_of_ours_leads_to_a_record_and_every_published_one_to_its_source(
    committed,
) -> None:
    numbers = committed.xpath(
        "//section[starts-with(@id, 'task-')]//table[not(contains(@class, 'legend'))]"
        "//*[@data-sort]"
    )
    assert len(numbers) > 100
    by_id = {element.get("id"): element for element in committed.xpath("//*[@id]")}
    for cell in numbers:
        [link] = cell.xpath("./a/@href")
        target = by_id[link[1:]]
        runs = target.xpath("descendant-or-self::div[@class='run']")
        assert runs or words(cell).rstrip(" †") in words(target)
    [number] = table(committed, "Results", "task-iwslt14").xpath(".//a[text()='34.4 †']")
    [source] = committed.xpath("//*[@id=$id]", id=number.get("href")[1:])
    assert "translation results, from memory" in words(source)


def test_a_mean_leads_to_all_of_its_runs(make_record) -> None:
    page = page_of(*(make_record(seed=seed) for seed in (1, 2, 10)), make_record(label="LN"))
    results = table(page, "Results", "task-iwslt14")
    alone, several = (
        row.xpath("./td[@data-sort]/a/@href")[0] for row in results.xpath(".//tr[td]")
    )
    assert alone == "#iwslt14-LN-seed1"
    [group] = page.xpath("//*[@id=$id]", id=several[1:])
    assert [words(run)[:7] for run in group.xpath(".//summary")] == [
        "seed 1:",
        "seed 2:",
        "seed 10",
    ]


def test_the_papers_number_beside_ours_leads_to_its_source(make_record, published_paper) -> None:
    page = page_of(make_record(), paper=published_paper)
    results = table(page, "Results", "task-iwslt14")
    [ours, theirs, difference] = results.xpath(".//tr[starts-with(th, 'PN')][1]/td/a")[:3]
    shown = words(ours), words(theirs), words(difference)
    assert shown == ("35.50 (n = 1)", "≈ 35.0", "+0.5")
    assert ours.get("href") == difference.get("href") == "#iwslt14-PN-seed1"
    [source] = page.xpath("//*[@id=$id]", id=theirs.get("href")[1:])
    assert "issue #9 of sIncerass/powernorm" in words(source)


def test_nothing_is_loaded_and_only_our_script_may_run(committed) -> None:
    assert not committed.xpath("//@src | //@srcset | //iframe | //object | //embed | //base")
    assert {link.split(",")[0] for link in committed.xpath("//link/@href")} == {"data:"}
    [style] = committed.xpath("//style/text()")
    assert "url(" not in style and "@import" not in style
    [script] = committed.xpath("//script/text()")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = committed.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy


def hostile_page(make_record, tmp_path: Path) -> str:
    """A page whose records hold markup wherever a record can hold text."""
    run = make_record(
        label=INJECTION,
        norm=INJECTION,
        status="failed",
        reason=INJECTION,
        budget=INJECTION,
        command=INJECTION,
        config={INJECTION: INJECTION},
        corpus={"name": INJECTION},
        hardware={INJECTION: INJECTION, "processor": INJECTION},
        versions={INJECTION: INJECTION},
        code_commit=INJECTION,
        config_hash=INJECTION,
        sites={INJECTION: {"name": INJECTION, INJECTION: INJECTION}},
        metrics={INJECTION: {INJECTION: INJECTION}, "test": {"sacrebleu_signature": INJECTION}},
        curve=[(1, 3.0), (2, 2.0)],
    )
    other = dataclasses.replace(run, task=INJECTION, seed=2)
    causality = CausalityRecord(
        **dict.fromkeys(("config_hash", "checkpoint", "split", "code_commit"), INJECTION),
        **dict.fromkeys(("command", "finished_at", "label"), INJECTION),
        **dict.fromkeys(("changed", "largest_nats"), 0.5),
        **dict.fromkeys(("perplexity_visible", "perplexity_random", "perplexity_hidden"), 9.0),
        **{"task": INJECTION, "seed": 1, "blocks": 1, "draw_seed": 1, "code_dirty": None},
        **{"sees_future_tokens": False, "versions": {INJECTION: INJECTION}},
    )
    folder = tmp_path / "runs" / "toy" / "<img src=x onerror=hacked()>-seed1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    rows = rows_by_task({Path("one.json"): run, Path("two.json"): other})
    unfinished = unfinished_runs(tmp_path)
    return report_html(rows, NO_PAPER, {Path("causality.json"): causality}, unfinished, MADE_AT)


def test_text_of_records_stays_text(make_record, tmp_path: Path) -> None:
    text = hostile_page(make_record, tmp_path)
    page = parsed(text)
    assert len(page.xpath("//script")) == len(page.xpath("//style")) == 1
    assert not page.xpath("//img") and not page.xpath("//@onerror | //@onload")
    assert len(page.xpath("//svg[not(ancestor::figure)]")) == 0
    assert page.body.text_content().count(INJECTION) > 30
    assert "<img" not in text and str(7919 * 7927) not in text


def test_tables_can_be_read_out(committed) -> None:
    assert committed.get("lang") == "en" and len(committed.xpath("//h1")) == 1
    for found in committed.xpath("//table"):
        assert found.xpath("./caption")
        assert all(head.get("scope") == "col" for head in found.xpath("./thead//th"))
        for row in found.xpath("./tbody/tr"):
            assert row.xpath("./th/@scope") == ["row"]
            assert len(row) == len(found.xpath("./thead/tr/th"))
    for control in committed.xpath("//input | //select"):
        assert control.get("aria-label") or control.xpath("ancestor::label")
    for box in committed.xpath("//div[@class='scroll']"):
        assert box.get("role") == "region" and box.get("aria-label") and box.get("tabindex") == "0"
    levels = [int(heading.tag[1]) for heading in committed.xpath("//h1|//h2|//h3|//h4")]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_suffices_in_both_schemes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (TEMPLATES / "report.css").read_text("utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    light, dark = schemes
    assert light.keys() == dark.keys() and luminance(dark["background"]) < 0.02
    for colours in schemes:
        for text in ("text", "muted", "link"):
            for behind in ("background", "head"):
                assert contrast(colours[text], colours[behind]) >= 4.5
        assert contrast(colours["text"], colours["target"]) >= 7


def drawn(figure) -> dict[str, dict[str, list]]:
    """By key: points of the line, of the band and of the letter in the coordinates of the SVG."""
    parts_of = {}
    for group in figure.xpath(".//svg//g[@data-key]"):
        parts = parts_of.setdefault(group.get("data-key"), {})
        for path in group.xpath("./path"):
            points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d"))
            kind = "line" if "fill: none" in path.get("style") else "band"
            parts[kind] = [(float(x), float(y)) for x, y in points]
        for text in group.xpath("./text"):
            assert words(text) == group.get("data-key")
            parts["letter"] = [(float(text.get("x")), float(text.get("y")))]
    return dict(sorted(parts_of.items()))


def to_scale(points: list[tuple[float, float]], by) -> list[tuple[float, float]]:
    """Updates and losses of points, given two points of a line and what they stand for."""
    ((x1, y1), (u1, l1)), ((x2, y2), (u2, l2)) = by
    return [
        (u1 + (x - x1) * (u2 - u1) / (x2 - x1), l1 + (y - y1) * (l2 - l1) / (y2 - y1))
        for x, y in points
    ]


def test_curves_are_means_with_bands(make_record) -> None:
    page = page_of(
        make_record(seed=1, curve=[(100, 4.0), (200, 3.0), (300, 2.5)]),
        make_record(seed=2, curve=[(100, 5.0), (200, 2.0)]),
        make_record(seed=3, curve=[(100, 4.75), (200, 80.0)], status="diverged", reason="NaN"),
        make_record(label="LN", curve=[(100, 4.5), (200, 4.25)]),
    )
    [figure] = page.xpath("//figure")
    shown = drawn(figure)
    assert list(shown) == ["A", "B", "C"]
    ln, pn, diverged = shown.values()
    assert "band" not in ln and "band" not in diverged
    by = list(zip(ln["line"], [(100, 4.5), (200, 4.25)], strict=True))
    near = {"rel": 1e-3}
    assert to_scale(pn["line"], by) == [
        pytest.approx(point, **near) for point in [(100, 4.5), (200, 2.5)]
    ]
    corners = {(round(u), round(loss, 2)) for u, loss in to_scale(pn["band"], by)}
    assert corners == {(100, 4.0), (200, 2.0), (200, 3.0), (100, 5.0)}
    assert to_scale(diverged["line"], by)[0] == pytest.approx((100, 4.75), **near)
    points = figure.xpath(".//tbody/tr/@data-points")
    assert points == [
        "100,4.5000,4.5000,4.5000 200,4.2500,4.2500,4.2500",
        "100,4.5000,4.0000,5.0000 200,2.5000,2.0000,3.0000",
        "100,4.7500,4.7500,4.7500 200,80.0000,80.0000,80.0000",
    ]
    lines = body(table(page, "Curves"))
    assert [line[1] for line in lines] == ["LN", "PN", "PN, seed 3 (diverged)"]
    assert lines[1][3:] == ["2", "2.5000", "200", "2.5000", "200"]
    # what did not complete does not stretch the axis of those that did: 2 to 5
    [box] = figure.xpath(".//clippath/rect | .//clipPath/rect")
    x, y, width, height = (float(box.get(name)) for name in ("x", "y", "width", "height"))
    (left, top), (right, bottom) = to_scale([(x, y), (x + width, y + height)], by)
    assert left == pytest.approx(0, abs=0.5) and 200 <= right < 220
    assert 5 < top < 5.5 and 1.5 < bottom < 2
    [plot] = figure.xpath("./div[@data-left]")
    [view] = figure.xpath(".//svg/@viewbox | .//svg/@viewBox")
    (left, _), (right, _) = to_scale([(0, 0), (float(view.split()[2]), 0)], by)
    assert float(plot.get("data-left")) == pytest.approx(left, abs=0.5)
    assert float(plot.get("data-right")) == pytest.approx(right, abs=0.5)


def test_curves_are_told_apart_without_colour(committed) -> None:
    figures = committed.xpath("//figure")
    assert len(figures) >= 3
    for figure in figures:
        keys = list(drawn(figure))
        assert len(set(keys)) == len(keys)
        assert keys == [words(key) for key in figure.xpath(".//tbody//b")]
        assert keys == figure.xpath(".//tbody/tr/@data-key")
        lines = figure.xpath(".//g[@data-key]/path[contains(@style, 'fill: none')]/@style")
        assert len(lines) == len(keys)
        assert len(set(lines)) == len(lines)
        dashes = {re.sub("stroke: [^;]*", "", style) for style in lines}
        assert len(dashes) == min(len(lines), len(DASHES))


def test_curves_take_their_colours_from_the_page(committed) -> None:
    """So that they follow the dark scheme."""
    styles = committed.xpath("//figure//svg//@style")
    assert len(styles) > 100
    colours = {c for style in styles for c in re.findall(r"(?:fill|stroke): ([^;]+)", style)}
    allowed = {
        f"var(--{name})" for name in ("muted", "grid", *(f"c{n}" for n in range(len(PALETTE))))
    }
    assert colours <= allowed | {"none"}


@pytest.mark.parametrize("ends", [[2.0] * 6, [2.0, 2.01, 2.02, 3.0, 3.001], [1.0, 9.0, 5.0]])
def test_letters_stand_on_their_curves_and_do_not_overlap(make_record, ends) -> None:
    page = page_of(
        *(make_record(label=f"X{n}", curve=[(1, 10.0), (9, end)]) for n, end in enumerate(ends))
    )
    shown = drawn(page.xpath("//figure")[0])
    assert len(shown) == len(ends)
    letters = []
    for parts in shown.values():
        ((x1, y1), (x2, y2)), [(x, y)] = parts["line"], parts["letter"]
        assert x1 < x < x2
        assert y == pytest.approx(y1 + (y2 - y1) * (x - x1) / (x2 - x1), abs=6)
        letters.append(x)
    assert min(b - a for a, b in itertools.pairwise(sorted(letters))) > 14


def test_the_letter_of_a_curve_that_leaves_the_chart_stays_in_it(make_record) -> None:
    page = page_of(
        make_record(label="LN", curve=[(1, 3.0), (9, 2.0)]),
        make_record(label="PN", curve=[(1, 3.0), (9, 900.0)], status="diverged", reason="NaN"),
    )
    [(_, y)] = drawn(page.xpath("//figure")[0])["B"]["letter"]
    [box] = page.xpath("//clippath/rect | //clipPath/rect")
    assert y >= float(box.get("y")) - 1


def test_without_curves_there_is_no_chart(make_record) -> None:
    for curve in ([], [(5, 2.0)]):
        page = page_of(make_record(curve=curve))
        assert not page.xpath("//figure") and "No validation curves" in words(page)


def test_failures_and_runs_under_way_are_listed(make_record, tmp_path: Path) -> None:
    diverged = {"status": "diverged", "reason": "loss is\nNaN", "diverged_at_update": 1234}
    folders = [tmp_path / "runs" / "ptb" / name for name in ("PN-seed1", "PN-seed2", "PN-seed3")]
    for folder in folders:
        folder.mkdir(parents=True)
    for folder in folders[:2]:
        (folder / "config.yaml").touch()
    (folders[1] / "record.json").touch()
    (folders[2] / "config.yaml").touch()
    with (folders[2] / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a run that is under way does
        unfinished = unfinished_runs(tmp_path)
    assert [(str(run.path), run.state) for run in unfinished] == [
        ("runs/ptb/PN-seed1", "interrupted"),
        ("runs/ptb/PN-seed3", "running"),
    ]
    page = page_of(
        make_record(),
        make_record(seed=2, **diverged),
        make_record(seed=3, status="failed", reason="out of memory", num_updates=None),
        unfinished=unfinished,
    )
    assert [line[:6] for line in body(table(page, "Runs that diverged or failed"))] == [
        ["iwslt14", "PN", "2", "diverged", "1,234", "loss is NaN"],
        ["iwslt14", "PN", "3", "failed", "", "out of memory"],
    ]
    [under_way] = page.xpath("//section[@id='under-way']")
    assert "runs/ptb/PN-seed1: interrupted, last changed 2" in words(under_way)
    assert "runs/ptb/PN-seed3: running, last changed 2" in words(under_way)
    [failures] = page.xpath("//section[@id='failures']")
    assert "PN-seed1" not in words(failures) and "PN-seed3" not in words(failures)
    sections = words(page.xpath("//nav")[0])
    assert "Under way or interrupted (2)" in sections and "Failures (2)" in sections
    assert "3 records (1 complete, 1 diverged, 1 failed)" in words(page)


def test_own_results_come_first_and_empty_tasks_of_the_paper_last(make_record) -> None:
    paper = load_paper(RESULTS / "paper.yaml")
    page = page_of(make_record(task="mine"), make_record(task="wikitext103"), paper=paper)
    order = [section.get("id") for section in page.xpath("//section")]
    own = [task for task in order if task in ("task-mine", "task-wikitext103")]
    assert order[: len(own)] == own and len(own) == 2
    empty = [f"task-{task}" for task in paper.tasks if task != "wikitext103"]
    assert order[-len(empty) - 1 :] == [*empty, "published"] and len(empty) >= 3
    links = [link.get("href").removeprefix("#") for link in page.xpath("//nav//a")]
    assert links == order


def test_every_field_of_a_run_is_shown(make_record) -> None:
    metrics = {"test": {"bleu_tokenised": 35.512345678901234, "sacrebleu": None}}
    page = page_of(make_record(metrics=metrics, code_dirty=True, budget="half an hour"))
    [run] = page.xpath("//*[@id='iwslt14-PN-seed1']")
    facts = dict(zip(map(words, run.xpath(".//dt")), map(words, run.xpath(".//dd")), strict=True))
    assert facts["commit"] == "0123456789abcdef0123456789abcdef01234567 with changes"
    assert facts["budget"] == "half an hour" and facts["wall time"] == "2 h 03 min"
    assert facts["versions"] == "python 3.11.7, torch 2.13.0"
    assert (facts["processor"], facts["cores"]) == ("Some CPU", "2")
    command, config = (pre.text_content() for pre in run.xpath(".//pre"))
    assert command == "python scripts/train.py task=iwslt14 norm=power seed=1"
    assert config == "dropout: 0.3\nseed: 1\ntask: iwslt14"
    assert body(table(run, "Metrics")) == [
        ["test", "bleu_tokenised", "35.512345678901234"],
        ["test", "sacrebleu", "not finite"],
    ]
    assert body(table(run, "Sites")) == [["encoder_attention", "power", "alpha_fwd 0.9"]]
    [corpus] = page.xpath("//*[@id=$id]", id=run.xpath(".//a/@href")[0][1:])
    assert "00" * 32 in corpus.text_content()


def test_ids_stay_apart(make_record) -> None:
    alike = [("a", "b-c"), ("a-b", "c"), ("runs", "x"), ("ü", "ü"), ("ä", "ä")]
    page = page_of(*(make_record(task=task, label=label) for task, label in alike))
    ids = page.xpath("//@id")
    assert len(ids) == len(set(ids)) and "" not in ids
    assert len(page.xpath("//div[@class='run']")) == len(alike)
    assert {link[1:] for link in page.xpath("//a/@href")} <= set(ids)


def test_a_column_of_numbers_knows_their_values(make_record) -> None:
    page = page_of(make_record(wall_time_seconds=4000.5, tokens_per_second=1234.5, label="LN"))
    runs = table(page, "Runs", "task-iwslt14")
    heads = [words(head) for head in runs.xpath(".//thead//th")]
    cells = dict(zip(heads, runs.xpath("./tbody/tr/*"), strict=True))
    assert cells["wall time"].get("data-sort") == "4000.5"
    assert cells["tokens/s"].get("data-sort") == "1234.5"
    assert cells["peak memory"].get("data-sort") == str(3 * 2**30)
    assert cells["status"].get("data-sort") is None


def test_empty_one_and_many(make_record, published_paper) -> None:
    assert "from 0 records (nothing has been trained yet)" in words(page_of())
    assert "35.9" in words(page_of(paper=published_paper))
    assert len(page_of(make_record()).xpath("//div[@class='run']")) == 1
    curve = [(update, 10 / math.log(update)) for update in range(1000, 61000, 1000)]
    many = [
        make_record(label=f"PN-{label}", seed=seed, curve=curve)
        for label in range(100)
        for seed in range(1, 6)
    ]
    page = page_of(*many)
    assert len(page.xpath("//div[@class='run']")) == 500
    [runs] = page.xpath("//section[@id='task-iwslt14']//table")[-1:]
    assert len(runs.xpath("./tbody/tr")) == 500
    assert len({*page.xpath("//figure//svg//g/@data-key")}) == 100


def test_the_committed_records_make_a_page_of_less_than_a_megabyte(committed) -> None:
    assert 100_000 < len(lxml.html.tostring(committed)) < 1_000_000


def test_the_script_writes_the_page_when_asked(make_record, tmp_path: Path) -> None:
    def report(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, SCRIPT, "--results", tmp_path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    write_record(record_path(tmp_path, run := make_record()), run)
    done = report("--html")
    assert done.returncode == 0 and f"written: {tmp_path}/report.html" in done.stdout
    page = parsed((tmp_path / "report.html").read_text("utf-8"))
    assert page.xpath("//*[@id='iwslt14-PN-seed1']")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    (tmp_path / "report.html").unlink()
    for other in ("--check", "--console-only"):
        refused = report("--html", other)
        assert refused.returncode == 2
        assert f"{other}: not allowed with argument --html" in refused.stderr.splitlines()[-1]
    for old in (["html=true"], ["html=yes"], ["--check", "html=true"]):
        refused = report(*old)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].endswith("write --html")
    assert not (tmp_path / "report.html").exists()
    ignored = ["git", "-C", REPOSITORY, "check-ignore", "-q", "results/report.html"]
    assert subprocess.run(ignored).returncode == 0
