"""What runs share is said once and linked; together with the link every setting can be read."""

from pathlib import Path

import yaml
from test_html_report import page_of, words

from normexp.report.repeated import Repeated

CONFIG = {"task": {"name": "ptb"}, "seed": 1, "norm": {"name": "layer", "options": {"eps": 1e-5}}}


def test_settings_are_those_of_the_first_run_but_for(make_record) -> None:
    other = CONFIG | {"seed": 2, "norm": {"name": "layer", "options": {}}, "more": [1, 2]}
    runs = {
        Path("a"): make_record(config=CONFIG),
        Path("b"): make_record(config=CONFIG | {"seed": 1.0}),
        Path("c"): make_record(config=CONFIG),
        Path("d"): make_record(config={"quite": "another"}),
        Path("e"): make_record(task="wmt14", config=CONFIG),
        Path("f"): make_record(config=CONFIG | {"wide": dict.fromkeys("abcdefgh", 0)}),
    }
    repeated = Repeated(runs)
    assert repeated.settings(Path("a")) == (None, CONFIG)
    first, changed = repeated.settings(Path("b"))
    assert first == Path("a") and repr(changed) == "{'seed': 1.0}"
    assert repeated.settings(Path("c")) == (Path("a"), {})
    assert repeated.settings(Path("d")) == (None, {"quite": "another"})
    assert repeated.settings(Path("e")) == (None, CONFIG)
    assert repeated.settings(Path("f"))[0] is None, "most settings are other ones"
    wide = {"wide": dict.fromkeys("abcdefgh", 0)}
    repeated = Repeated(
        {Path("a"): make_record(config=CONFIG | wide), Path("b"): make_record(config=other | wide)}
    )
    changed = {"more": [1, 2], "norm.options": {}, "norm.options.eps": "(absent)", "seed": 2}
    assert repeated.settings(Path("b")) == (Path("a"), changed)


def test_the_page_links_what_is_equal(make_record) -> None:
    hardware = {"processor": "Another CPU", "num_cores": 2}
    config = {"task": "iwslt14", "dropout": 0.3, "lr": 0.1}
    page = page_of(
        make_record(seed=1, config=config),
        make_record(seed=2, config=config | {"lr": 0.5}),
        make_record(seed=3, config=config, hardware=hardware, sites={"x": {"name": "rms"}}),
    )
    first, second, third = page.xpath("//div[@class='run']")
    assert yaml.safe_load(first.xpath(".//pre")[1].text_content()) == config
    assert yaml.safe_load(second.xpath(".//pre")[1].text_content()) == {"lr": 0.5}
    assert len(third.xpath(".//pre")) == 1
    links = [link.get("href") for link in second.xpath(".//a")]
    assert links.count("#iwslt14-PN-seed1") == 3
    assert "Some CPU" in words(first) and "Some CPU" not in words(second)
    assert "Another CPU" in words(third) and "Sites sitenormoptions xrms" in words(third)
