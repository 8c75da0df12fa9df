"""Committed results: runs neither write nor repeat them, and one command adds to them."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_runs import composed, few_sentences, run_script, train_script

from normexp import pipeline
from normexp.errors import UserError
from normexp.evaluation import reevaluation
from normexp.evaluation.promotion import promote
from normexp.paths import OWN_RESULTS, RESULTS
from normexp.runs import evidence, lookup, records
from normexp.runs.folder import RunFolder, hold
from normexp.runs.records import read_record, write_record

STOCK = [
    "speed.fast_dropout=false",
    "speed.fused_loss=false",
    "speed.fused_adam=false",
    "seeding=fairseq",
]


def test_runs_leave_their_results_elsewhere() -> None:
    settings = composed("task=multi30k", "norm=layer")
    assert settings.results_dir.resolve() == OWN_RESULTS
    assert settings.run_dir.resolve().is_relative_to(OWN_RESULTS)
    with pytest.raises(UserError, match=r"results_dir=results holds the committed results"):
        pipeline.run(composed("results_dir=results", "tracking=disabled"))


@pytest.mark.parametrize(
    "where",
    [
        "results_dir=results/records",  # its records would be records of a task "records"
        "results_dir=results/own/..",
        "run_dir=results/translations/multi30k/LN-seed1",
        "run_dir=results",
    ],
)
def test_no_path_leads_a_run_among_the_committed_results(where: str) -> None:
    with pytest.raises(UserError, match=f"{where} holds the committed results"):
        evidence.refuse_evidence(composed(where))


def test_no_link_leads_a_run_among_the_committed_results(tmp_path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "multi30k").symlink_to(RESULTS / "records" / "multi30k")
    with pytest.raises(UserError, match="holds the committed results"):
        evidence.refuse_evidence(composed("task=multi30k", f"results_dir={tmp_path}"))
    evidence.refuse_evidence(composed("task=ptb", f"results_dir={tmp_path}"))


def test_own_results_on_another_disk_are_own_results(tmp_path, monkeypatch) -> None:
    (link := tmp_path / "own").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(evidence, "OWN_RESULTS", link)
    assert evidence.evidence_beside(link) == RESULTS
    assert evidence.evidence_beside(tmp_path) is None


@pytest.mark.parametrize(
    ("task", "settings"), [("multi30k", []), ("ptb", [*STOCK, "label=LN"])], ids=["multi30k", "ptb"]
)
def test_a_committed_run_is_done_where_own_runs_are_looked_up(tmp_path, task, settings) -> None:
    path = RESULTS / "records" / task / "LN-seed1.json"
    recorded = [f"task={task}", "norm=layer", *settings]
    found = lookup.find_finished(composed(*recorded))
    assert found is not None and found[0] == path
    assert "(committed; results_dir=FOLDER makes it again)" in lookup.already(path)
    assert lookup.find_finished(composed(*recorded, "seed=2")) is None
    assert lookup.find_finished(composed(*recorded, f"results_dir={tmp_path}")) is None


@pytest.mark.parametrize("task", ["precision_toy", "precision_multi30k"])
def test_an_experiment_finds_its_committed_runs(task: str) -> None:
    paths = sorted((RESULTS / "records" / task).glob("*.json"))
    assert len(paths) >= 6
    for path in paths:
        record = read_record(path)
        own = [f"norm={record.norm}", f"seed={record.seed}"]
        precision = f"speed.precision={record.config['speed']['precision']}"
        found = lookup.find_finished(composed(f"+experiment={task}", *own, precision))
        assert found == (path, record)


def test_benchmarks_leave_committed_records_alone() -> None:
    path = RESULTS / "benchmarks" / "norms.json"
    before = path.read_bytes()
    ended = run_script("benchmark.py", "norms", "--rounds", "2", "--output", str(path))
    assert ended.returncode == 1 and "is a committed record" in ended.stderr
    assert path.read_bytes() == before
    assert "results/own/benchmarks/norms.json" in run_script("benchmark.py", "norms", "-h").stdout


@pytest.fixture
def finished(overrides, little_text, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The folder of a finished translation run and one for evidence."""
    command = overrides(
        "toy_translation", f"data.dir={little_text}", "fairseq.optimization.max_epoch=1"
    )
    monkeypatch.setattr(pipeline.provenance, "code_version", lambda _: ("c" * 40, False))
    settings = composed(*command)
    pipeline.run(settings)
    return settings.run_dir, tmp_path / "evidence"


def test_a_run_is_promoted_with_its_translations(
    finished, little_text, capsys, monkeypatch
) -> None:
    folder, committed = finished
    written = promote(folder, committed, replace=False)
    record = read_record(committed / "records/toy_translation/LN-seed1.json")
    assert record == read_record(folder / "record.json")
    texts = committed / "translations/toy_translation/LN-seed1"
    names = {f"{split}{kind}.txt" for split in ("valid", "test") for kind in ("", ".tokenised")}
    assert {path.name for path in texts.iterdir()} == names and len(written) == 5

    # BLEU of the committed files alone, through the command.
    path = committed / "records/toy_translation/LN-seed1.json"
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:  # also by its bare name
        patch.chdir(path.parent)
        reevaluation.main(Path(path.name), [f"data.dir={little_text}"], fold=False)
    shown = capsys.readouterr().out
    for metrics in record.metrics.values():
        for name in ("bleu_tokenised", "sacrebleu"):
            assert shown.count(f"{metrics[name]:.3f}") >= 2

    # And it is noticed if they are not those of the record.
    lines = (texts / "test.tokenised.txt").read_text().splitlines()
    (texts / "test.tokenised.txt").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="11 and 12 translations of test, which has 12 sentences"):
        reevaluation.main(path, [f"data.dir={little_text}"], fold=False)


def test_what_is_no_evidence_is_refused(finished, little_text) -> None:
    folder, committed = finished
    record = read_record(folder / "record.json")

    def refused(message: str, changed: records.Record = record, **options: bool) -> None:
        write_record(folder / "record.json", changed)
        with pytest.raises(UserError, match=message):
            promote(folder, committed, **{"replace": False} | options)

    refused("differs from its commit", replace(record, code_dirty=True))
    refused("differs from its commit", replace(record, code_dirty=None))
    refused("that is no evidence", replace(record, status="failed", reason="x"))
    better = {
        split: m | {"sacrebleu": m["sacrebleu"] + 0.01} for split, m in record.metrics.items()
    }
    refused("sacrebleu is .*, the record says", replace(record, metrics=better))
    other = json.loads(json.dumps(record.corpus))
    other["hashes"]["data-bin/dict.en.txt"]["sha256"] = "0" * 64
    refused(
        r"dict\.en\.txt is not the file that the record was made with",
        replace(record, corpus=other),
    )
    longer = json.loads(json.dumps(record.config))
    longer["fairseq"]["optimization"]["max_epoch"] = 60
    for claimed in (
        {"config_hash": "0" * 12},
        {"config": longer},
        {"label": "PN"},
        {"task": "../elsewhere"},
    ):
        refused("is of another configuration than", replace(record, **claimed))
    assert not committed.exists()

    write_record(folder / "record.json", record)
    with hold(RunFolder(folder)), pytest.raises(UserError, match="in use by another process"):
        promote(folder, committed, replace=False)
    promote(folder, committed, replace=False)
    promote(folder, committed, replace=False)  # the same again changes nothing
    refused("--replace puts", later := replace(record, finished_at="2030-01-01T00:00:00Z"))
    promote(folder, committed, replace=True)
    assert read_record(committed / "records/toy_translation/LN-seed1.json") == later


@pytest.mark.parametrize(
    "damage",
    [
        {"corpus": {}},
        {"corpus": {"name": None, "hashes": {}}},
        {"corpus": {"name": "toy_translation"}},
        {"corpus": {"name": "toy_translation", "hashes": []}},
        {"corpus": {"name": "toy_translation", "hashes": {"data-bin/dict.en.txt": {}}}},
        {"config": {}},
        {"config": {"evaluation": None}},
    ],
    ids=str,
)
def test_a_record_of_damaged_parts_is_told_in_a_line(damage: dict, tmp_path) -> None:
    (path,) = (RESULTS / "records" / "precision_toy").glob("PN-float32-seed1.json")
    record = replace(read_record(path), **damage)
    copy = tmp_path / "records/precision_toy" / path.name
    write_record(copy, record)
    (tmp_path / "translations/precision_toy" / path.stem).mkdir(parents=True)
    with pytest.raises(UserError, match=r"corpus of the record: |is not the file"):
        reevaluation.main(copy, [f"data.dir={tmp_path}"], fold=False)


def test_translations_are_not_put_beside_a_record_of_another_run(finished) -> None:
    """A committed record may have no translations, as those of earlier versions."""
    folder, committed = finished
    other = replace(read_record(folder / "record.json"), finished_at="2020-01-01T00:00:00Z")
    write_record(path := committed / "records/toy_translation/LN-seed1.json", other)
    with pytest.raises(UserError, match="--replace puts"):
        promote(folder, committed, replace=False)
    assert read_record(path) == other and not (committed / "translations").exists()


def test_a_file_changed_in_place_is_not_trained_on(finished, little_text, caplog) -> None:
    """Same size, same name: the record would state the hash of another file."""
    from normexp.corpora import prepare

    corpus = prepare("toy_translation", little_text)
    path = corpus.data_bin / "train.de-en.en.bin"
    original = path.read_bytes()
    path.write_bytes(original[:-2] + bytes([original[-2] ^ 1]) + original[-1:])
    prepare("toy_translation", little_text)
    assert "train.de-en.en.bin was changed since it was prepared" in caplog.text
    assert path.read_bytes() == original


def test_counts_changed_in_a_manifest_do_not_change_a_perplexity(tmp_path, caplog) -> None:
    """Perplexity per word divides by the words that the manifest has."""
    from normexp.corpora import prepare

    catalogue = few_sentences(tmp_path)
    path = prepare("toy_language_model", tmp_path, catalogue=catalogue).directory / "manifest.json"
    original = path.read_text()
    changed = json.loads(original)
    changed["splits"]["test"]["words"]["en"] *= 2
    path.write_text(json.dumps(changed))
    prepare("toy_language_model", tmp_path, catalogue=catalogue)
    assert "manifest.json was changed since it was made" in caplog.text
    assert path.read_text() == original


@pytest.mark.parametrize("task", ["toy_language_model", "toy_translation"])
def test_data_put_beside_the_corpus_are_not_trained_on(task: str, tmp_path) -> None:
    """fairseq reads train1 behind train."""
    from normexp.corpora import prepare

    catalogue = few_sentences(tmp_path)
    data_bin = prepare(task, tmp_path, catalogue=catalogue).data_bin
    added = []
    for path in data_bin.glob("valid*.*"):
        added.append(path.with_name(path.name.replace("valid", "train1")))
        shutil.copy(path, added[-1])
    with pytest.raises(UserError, match=r"train1.* is none of the corpus's files"):
        prepare(task, tmp_path, catalogue=catalogue)
    for path in added:
        path.unlink()
    prepare(task, tmp_path, catalogue=catalogue)


def test_a_training_does_not_go_on_with_other_data(tmp_path, overrides, monkeypatch, capsys):
    from normexp.corpora import prepare

    *others, _ = prepare.__defaults__
    catalogue = few_sentences(tmp_path / "few")
    monkeypatch.setattr(prepare, "__defaults__", (*others, catalogue))
    command = overrides("toy_language_model", f"data.dir={tmp_path / 'few'}")
    settings = composed(*command)
    pipeline.run(settings)
    (settings.run_dir / "record.json").unlink()  # as if killed before its end
    known = catalogue.read_text()
    catalogue.write_text(known.replace("train: 200", "train: 210"))
    with pytest.raises(UserError, match=r"was trained on other data: "):
        pipeline.run(settings)
    reevaluation.main(settings.run_dir, [], fold=False)  # without a record nothing to compare
    assert "other data" not in capsys.readouterr().out
    catalogue.write_text(known)
    record = pipeline.run(settings)
    assert record.status == "complete"
    catalogue.write_text(known.replace("train: 200", "train: 210"))
    reevaluation.main(settings.run_dir, [], fold=False)
    assert "other data: " in capsys.readouterr().out


def test_the_command_of_a_record_is_that_run_for_a_shell(overrides, little_text, tmp_path) -> None:
    own = [
        *("fairseq.optimization.max_update=1", "evaluation.splits=[valid]", "label=a+${norm.name}"),
        "norm.sites.decoder_ffn={name: power, alpha_fwd: 0.95}",
        "norm.options.eps=1e-4",
    ]
    command = overrides("toy_language_model", f"data.dir={little_text}", *own)
    # One run of a sweep: the record has the overrides of this run.
    assert train_script("-m", *command, "seed=1,2").returncode == 0
    record = read_record(tmp_path / "results/records/toy_language_model/a+layer-seed2.json")
    words = shlex.split(record.command)
    assert words[:2] == ["python", "scripts/train.py"] and "seed=2" in words
    assert not any(word.startswith(("data.", "results_dir", "tracking")) for word in words)
    again = train_script(*words[2:], f"results_dir={tmp_path / 'results'}")
    assert again.returncode == 0 and "complete already" in again.stdout, again.stderr


def test_a_record_names_what_departs(overrides, little_text, tmp_path) -> None:
    command = overrides(
        "toy_language_model", f"data.dir={little_text}", "evaluation.splits=[valid]"
    )
    record = pipeline.run(composed(*command, "fairseq.optimization.max_update=1"))
    assert "fairseq.optimization.max_update=1 instead of 516" in record.departures
    assert record.budget.endswith("fairseq.optimization.max_update=1 instead of 516")
    assert (
        record.config_hash
        == read_record(records.record_path(tmp_path / "results", record)).config_hash
    )


def test_a_folder_of_files_without_settings_is_nobodys(overrides, little_text, tmp_path) -> None:
    command = overrides("toy_language_model", f"data.dir={little_text}")
    settings = composed(*command, "fairseq.optimization.max_update=1", "evaluation.splits=[valid]")
    pipeline.run(settings)
    (settings.run_dir / "config.yaml").unlink()
    before = {path: path.read_bytes() for path in settings.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"has no config\.yaml but checkpoints"):
        pipeline.run(settings.model_copy(update={"results_dir": tmp_path / "elsewhere"}))
    assert {p: p.read_bytes() for p in settings.run_dir.rglob("*") if p.is_file()} == before


def test_own_reports_show_the_committed_runs_of_their_tasks(
    tmp_path, make_record, monkeypatch
) -> None:
    own = make_record(task="ptb", label="PN+alpha_fwd=0.8")
    path = records.record_path(tmp_path, own)
    write_record(path, own)
    assert list(evidence.load_records_beside(tmp_path)) == [path]
    monkeypatch.setattr(evidence, "OWN_RESULTS", tmp_path)
    shown = evidence.load_records_beside(tmp_path)
    committed = set((RESULTS / "records" / "ptb").glob("*.json"))
    assert shown.keys() == {path, *committed} and len(committed) > 3
