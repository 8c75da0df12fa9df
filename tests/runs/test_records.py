"""Records survive writing and reading, say what is wrong with them, and betray no machine."""

import dataclasses
import importlib.metadata
import json
import math
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normexp.config.identity import hash_config
from normexp.errors import UserError
from normexp.runs import records
from normexp.runs.provenance import code_version, hardware_facts, package_versions, utc_now
from normexp.runs.records import Record, load_records, read_record, record_path, write_record

names = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(names, json_values, max_size=4)
counts = st.none() | st.integers(0, 2**53)
any_record = st.builds(
    Record,
    task=names,
    kind=st.sampled_from(["translation", "language_model"]),
    norm=names,
    label=names,
    seed=st.integers(0, 2**31),
    sites=st.dictionaries(names, json_objects, max_size=7),
    status=st.sampled_from(["complete", "diverged", "failed"]),
    reason=st.none() | names,
    diverged_at_update=counts,
    metrics=st.dictionaries(
        st.sampled_from(["valid", "test"]), st.dictionaries(names, st.none() | numbers | names)
    ),
    curve=st.lists(st.tuples(st.integers(0, 2**53), numbers), max_size=3),
    sees_future_tokens=st.none() | st.booleans(),
    num_parameters=counts,
    num_updates=counts,
    num_epochs=st.none() | numbers,
    tokens_per_second=st.none() | numbers,
    peak_memory_bytes=counts,
    wall_time_seconds=st.none() | numbers,
    hardware=json_objects,
    versions=st.dictionaries(names, names),
    code_commit=names,
    code_dirty=st.none() | st.booleans(),
    command=names,
    config=json_objects,
    config_hash=names,
    corpus=json_objects,
    budget=st.none() | names,
    finished_at=st.datetimes().map(lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")),
)


@settings(deadline=None)
@given(record=any_record)
def test_what_is_written_is_read_back(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("records") / "folder" / "record.json"
    write_record(path, record)
    assert read_record(path) == record


def test_numbers_that_are_not_finite_become_null(tmp_path, make_record):
    metrics = {"test": {"perplexity_per_word": math.inf, "loss_per_token_nats": 3.5}}
    record = make_record(
        metrics=metrics, tokens_per_second=math.nan, config={"a": [1.0, -math.inf]}
    )
    write_record(tmp_path / "record.json", record)
    read = read_record(tmp_path / "record.json")
    assert read.metrics == {"test": {"perplexity_per_word": None, "loss_per_token_nats": 3.5}}
    assert read.tokens_per_second is None
    assert read.config == {"a": [1.0, None]}


def test_equal_records_are_equal_bytes(tmp_path, make_record):
    write_record(tmp_path / "a.json", make_record(config={"x": 1, "y": {"b": 2, "a": 3}}))
    write_record(tmp_path / "b.json", make_record(config={"y": {"a": 3, "b": 2}, "x": 1}))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_an_interrupted_write_leaves_the_old_record(tmp_path, make_record, monkeypatch):
    path = tmp_path / "record.json"
    write_record(path, make_record(seed=1))

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_record(path, make_record(seed=2))
    assert read_record(path).seed == 1
    assert list(tmp_path.iterdir()) == [path]


def test_no_path_of_this_machine_is_stored(tmp_path, make_record, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/users/ada")
    here = str(tmp_path)
    record = make_record(
        status="failed",
        reason=f"File '{here}/normexp/x.py', line 3; see /users/ada/.cache/x; {here}.",
        command=f"python {here}/scripts/train.py",
        config={"data": [f"{here}/data/iwslt14"], "other": ["/users/adamant/x", f"/mnt{here}/x"]},
    )
    write_record(tmp_path / "record.json", record)
    read = read_record(tmp_path / "record.json")
    assert read.reason == "File './normexp/x.py', line 3; see ~/.cache/x; .."
    assert read.command == "python ./scripts/train.py"
    # Only whole names of folders are replaced.
    assert read.config == record.config | {"data": ["./data/iwslt14"]}


def broken(**changes):
    return lambda content: json.dumps(content | changes)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda content: json.dumps(content)[:-40], "not JSON"),
        (lambda content: "", "not JSON"),
        (lambda content: json.dumps(content | {"num_epochs": math.nan}), "NaN is not a JSON"),
        (lambda content: json.dumps([content]), "schema None is unknown"),
        (broken(schema_version=2), "schema 2 is unknown; this version reads 1"),
        (
            lambda content: json.dumps({k: v for k, v in content.items() if k != "seed"}),
            " seed: Field required",
        ),
        (broken(sed=1), " sed: Unexpected keyword"),
        (broken(seed="1"), " seed: Input should be a valid integer"),
        (broken(status="done"), " status: Input should be 'complete'"),
        (broken(metrics={"test": {"sacrebleu": [1.0]}}), "metrics.test.sacrebleu"),
        (broken(finished_at="yesterday"), "finished_at"),
    ],
)
def test_a_bad_record_is_named_with_its_fault(tmp_path, make_record, spoil, cause):
    path = tmp_path / "PN-seed1.json"
    write_record(path, make_record())
    path.write_text(spoil(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: ")
    assert cause in str(error.value)


def test_a_record_of_wrong_types_is_not_written(tmp_path, make_record):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match=": num_updates: "):
        write_record(path, make_record(num_updates=1.5))
    assert not path.exists()


def test_paths_are_made_from_task_label_and_seed(make_record):
    for label, name in [
        ("LN", "LN-seed3.json"),
        ("PN-V", "PN-V-seed3.json"),
        ("PN-", "PN--seed3.json"),
        ("PN+alpha_fwd=0.8", "PN+alpha_fwd=0.8-seed3.json"),
    ]:
        path = record_path(Path("results"), make_record(task="ptb", label=label, seed=3))
        assert path == Path("results/records/ptb") / name


def test_all_records_are_loaded_in_the_order_of_their_paths(tmp_path, make_record):
    assert load_records(tmp_path) == {}
    made = [make_record(task=t, seed=s) for t in ("iwslt14", "ptb") for s in (1, 2)]
    for record in reversed(made):
        write_record(record_path(tmp_path, record), record)
    loaded = load_records(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in loaded] == [
        "records/iwslt14/PN-seed1.json",
        "records/iwslt14/PN-seed2.json",
        "records/ptb/PN-seed1.json",
        "records/ptb/PN-seed2.json",
    ]
    assert list(loaded.values()) == made


def test_a_copied_record_is_refused(tmp_path, make_record):
    record = make_record(seed=1)
    write_record(record_path(tmp_path, record), record)
    write_record(record_path(tmp_path, make_record(seed=2)), record)
    with pytest.raises(UserError, match=r"PN-seed2\.json: .* belongs at .*PN-seed1\.json"):
        load_records(tmp_path)


@settings(deadline=None)
@given(config=json_objects, seeds=st.tuples(st.integers(), st.integers()))
def test_the_hash_ignores_order_and_what_it_is_told_to_ignore(config, seeds):
    first, second = (
        dict(reversed(list(config.items())), seed=seed, common={"seed": seed, "fp16": False})
        for seed in seeds
    )
    ignored = ("seed", "common.seed", "absent.key")
    assert hash_config(first, ignored) == hash_config(dict(reversed(second.items())), ignored)
    assert (hash_config(first) == hash_config(second)) == (seeds[0] == seeds[1])
    assert hash_config(first, ignored) != hash_config(first | {"common": {"fp16": True}}, ignored)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.check_output(["git", "-C", folder, *identity, *arguments], text=True).strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "results").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "code.py").write_text("x = 1\n", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_version_of_the_code_is_its_commit(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert code_version(repository) == (head, False)
    (repository / "results" / "record.json").write_text("{}", encoding="utf-8")
    assert code_version(repository) == (head, False)
    (repository / "new_norm.py").write_text("", encoding="utf-8")
    assert code_version(repository) == (head, True)
    (repository / "new_norm.py").unlink()
    (repository / "code.py").write_text("x = 2\n", encoding="utf-8")
    assert code_version(repository) == (head, True)


def test_without_git_the_version_is_unknown(repository, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    assert code_version(outside) == ("unknown", None)
    inside = repository / "vendored"
    inside.mkdir()
    assert code_version(inside) == ("unknown", None)
    monkeypatch.setenv("PATH", str(outside))
    assert code_version(repository) == ("unknown", None)


def test_versions_are_those_of_the_installed_packages(monkeypatch):
    versions = package_versions()
    assert versions["torch"] == torch.__version__
    assert set(versions) >= {"python", "fairseq-fixed", "hydra-core", "sacrebleu", "wandb", "numpy"}

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert package_versions()["torch"] == "not installed"


def test_hardware_is_described_without_naming_the_machine():
    facts = hardware_facts()
    assert facts["num_threads"] == torch.get_num_threads()
    assert 1 <= facts["num_cores"] <= os.cpu_count()
    with open("/proc/meminfo", encoding="utf-8") as meminfo:
        total = int(meminfo.readline().split()[1]) * 1024
    assert facts["memory_bytes"] == pytest.approx(total, rel=1e-3)
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert socket.gethostname() not in json.dumps(facts)


def test_the_time_is_one_that_records_accept(tmp_path, make_record):
    write_record(tmp_path / "record.json", make_record(finished_at=utc_now()))
    assert read_record(tmp_path / "record.json").finished_at.endswith("+00:00")


def test_every_field_is_in_the_file(tmp_path, make_record):
    write_record(tmp_path / "record.json", make_record())
    content = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert set(content) == {field.name for field in dataclasses.fields(records.Record)}
