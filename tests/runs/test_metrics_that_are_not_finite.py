"""Infinite perplexities are results, losses that are no numbers are divergence, garbage is left."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import composed, train_script

from normexp import pipeline
from normexp.evaluation import scores
from normexp.runs import records
from normexp.runs.metric_values import unknown_values, value_of
from normexp.runs.metrics_file import MetricsFile
from normexp.runs.perplexity import perplexity


@given(st.floats(allow_nan=False))
def test_perplexity_is_exp_and_infinite_beyond(nats: float) -> None:
    found = perplexity(nats)
    if nats > math.log(sys.float_info.max):
        assert found == math.inf
    else:
        assert found == math.exp(nats)


def test_perplexity_of_no_number_is_none() -> None:
    assert math.isnan(perplexity(math.nan))
    assert perplexity(709.0) < math.inf == perplexity(710.0) == perplexity(math.inf)


def test_a_null_is_infinite_beside_the_finite_loss_it_is_made_of() -> None:
    metrics = {
        "loss_per_token_nats": 800.0,
        "perplexity_per_token": None,
        "perplexity_per_word": None,
        "streamed_loss_per_token_nats": None,
        "streamed_perplexity_per_word": None,
        "sacrebleu": None,
        "sacrebleu_signature": "text",
        "bleu_tokenised": 3.5,
    }
    found = {name: value_of(metrics, name) for name in (*metrics, "absent")}
    assert found == dict.fromkeys([*metrics, "absent"]) | {
        "loss_per_token_nats": 800.0,
        "perplexity_per_token": math.inf,
        "perplexity_per_word": math.inf,
        "bleu_tokenised": 3.5,
    }
    assert unknown_values({"test": metrics}) == [
        "test streamed_loss_per_token_nats",
        "test streamed_perplexity_per_word",
        "test sacrebleu",
    ]
    as_computed = {"loss_per_token_nats": 800.0, "perplexity_per_token": math.inf}
    assert unknown_values({"test": as_computed}) == []
    no_numbers = {"loss_per_token_nats": math.inf, "perplexity_per_token": math.inf}
    assert len(unknown_values({"test": no_numbers})) == 2


@pytest.fixture
def small(overrides, little_text: Path) -> Callable[..., list[str]]:
    def build(*more: str) -> list[str]:
        tokens = "fairseq.dataset.max_tokens=1200"
        return overrides("toy_language_model", f"data.dir={little_text}", tokens, *more)

    return build


@pytest.fixture
def scored(monkeypatch) -> Callable[[float], None]:
    """scored(nats): from now on the test set has this loss per token."""
    original = scores.score

    def set_loss(nats: float) -> None:
        def score(loaded, split, *arguments):
            total, tokens = original(loaded, split, *arguments)
            return (nats * tokens if split == "test" else total), tokens

        monkeypatch.setattr(scores, "score", score)

    return set_loss


def only_record(results: Path) -> tuple[Path, dict]:
    (path,) = (results / "records").rglob("*.json")
    return path, json.loads(path.read_text())


def test_a_huge_test_loss_is_a_result(small, scored, tmp_path: Path) -> None:
    scored(800.0)
    record = pipeline.run(composed(*small()))
    assert record.status == "complete"
    assert "perplexity per word inf, per token inf" in records.describe(record)
    _, written = only_record(tmp_path / "results")
    assert written["metrics"]["test"]["perplexity_per_token"] is None
    assert written["metrics"]["test"]["loss_per_token_nats"] == pytest.approx(800.0)
    shown = train_script(*small())  # in a fork, where the loss is as patched, if it is computed
    assert shown.returncode == 0 and "complete already" in shown.stdout, shown.stderr
    assert "perplexity per word inf" in shown.stdout


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_test_loss_that_is_no_number_is_divergence(loss, small, scored, tmp_path: Path) -> None:
    scored(loss)
    record = pipeline.run(composed(*small()))
    assert record.status == "diverged" and record.num_updates > 0
    assert "test loss_per_token_nats" in record.reason and "is not finite" in record.reason
    assert pipeline.run(composed(*small())).status == "diverged"  # not tried again
    _, written = only_record(tmp_path / "results")
    assert written["metrics"]["test"]["loss_per_token_nats"] is None


def test_a_complete_record_without_numbers_is_evaluated_again(small, tmp_path: Path) -> None:
    """Earlier versions wrote such records."""
    straight = pipeline.run(composed(*small()))
    published, content = only_record(tmp_path / "results")
    (own,) = (tmp_path / "results/runs").rglob("record.json")
    last = own.parent / "checkpoints/checkpoint_last.pt"
    before = last.stat().st_mtime_ns
    for path in (published, own):
        content["metrics"]["test"] = dict.fromkeys(content["metrics"]["test"])
        path.write_text(json.dumps(content))
    assert "not finite" in records.describe(records.read_record(published))
    shown = train_script(*small())
    assert shown.returncode == 0, shown.stderr
    assert "complete already" not in shown.stdout
    assert only_record(tmp_path / "results")[1]["metrics"] == straight.metrics
    assert last.stat().st_mtime_ns == before


GARBAGE = [
    '{"tag": "valid", "step": 1, "time": 1.0, "loss": NaN}',
    '{"tag": "valid", "step": 2, "time": 1.0, "loss": 1e999}',
    '{"tag": "valid", "step": 3, "time": 1.0, "loss": "low"}',
    '{"tag": "valid", "step": 4, "time": 1.0, "loss": [1]}',
    '{"tag": "valid", "step": 5, "time": 1.0, "loss": true}',
    f'{{"tag": "valid", "step": 6, "time": 1.0, "loss": {"9" * 400}}}',
    '{"tag": "valid", "step": true, "time": 1.0, "loss": 1.0}',
    '{"tag": "valid", "step": 1e999, "time": 1.0, "loss": 1.0}',
    "[" * 5000,
    "nonsense",
]


def test_garbage_among_the_metrics_stops_nothing(small, tmp_path: Path) -> None:
    straight = pipeline.run(composed(*small()))
    published, _ = only_record(tmp_path / "results")
    (metrics,) = (tmp_path / "results/runs").rglob("metrics.jsonl")
    metrics.write_text("\n".join(GARBAGE) + "\n" + metrics.read_text())
    published.unlink()
    (metrics.parent / "record.json").unlink()
    record = pipeline.run(composed(*small()))
    assert record.status == "complete" and record.curve == straight.curve


@given(
    st.lists(
        st.fixed_dictionaries(
            {"tag": st.just("valid"), "step": st.integers(1, 9)},
            optional={"loss": st.floats() | st.text() | st.none() | st.integers() | st.booleans()},
        )
    )
)
def test_values_are_finite_numbers(tmp_path_factory, entries: list[dict]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with MetricsFile(path) as metrics:
        values = metrics.values("valid", "loss")
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    last = {entry["step"]: entry.get("loss") for entry in entries}
    expected = {step for step, x in last.items() if type(x) in (int, float) and abs(x) < math.inf}
    assert values.keys() == expected
