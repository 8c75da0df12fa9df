"""Names of runs and marks of their budgets follow what a command changes."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import composed

from normexp.config.departures import Departure, _suffix, marked_budget
from normexp.config.identity import config_hash
from normexp.errors import UserError
from normexp.runs.records import path_of_run


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "PN"),
        (["norm.options.alpha_fwd=0.8"], "PN+alpha_fwd=0.8"),
        (["norm.options.alpha_fwd=0.9"], "PN"),  # as it is anyway
        (["fairseq.optimization.lr=[0.01]"], "PN+optimization.lr=0.01"),
        (["evaluation.beam=1", "norm.options.eps=1e-3"], "PN+eps=0.001+evaluation.beam=1"),
        (["norm.options.eps=1e-3", "evaluation.beam=1"], "PN+eps=0.001+evaluation.beam=1"),
        (["model=translation_small_cpu"], "PN+model=translation_small_cpu"),
        (["seed=3", "tracking=disabled", "data.dir=/x", "results_dir=/y"], "PN"),
        (["task.norm_warmup_steps=7"], "PN+task.norm_warmup_steps=7"),  # options follow it
        (["norm.sites.decoder_ffn=power"], "PN+norm.sites.decoder_ffn=power"),
        # one number in several forms
        (["norm.options.alpha_fwd=9e-1"], "PN"),
        (["norm.options.alpha_fwd=1"], "PN+alpha_fwd=1.0"),
        (["evaluation.length_penalty=1", "fairseq.optimizer.weight_decay=-0.0"], "PN"),
        (["fairseq.optimization.clip_norm=2"], "PN+optimization.clip_norm=2.0"),
        (["fairseq.optimization.clip_norm=2e0"], "PN+optimization.clip_norm=2.0"),
        (["norm.options.warmup_steps=3.0"], "PN+warmup_steps=3"),
        (["+fairseq.model.relu_dropout=0.0"], "PN+model.relu_dropout=0"),
        (["+fairseq.model.relu_dropout=0"], "PN+model.relu_dropout=0"),
        (["label=mine", "norm.options.alpha_fwd=0.8"], "mine"),
        (["label=PN-"], "PN-"),
        (["+experiment=precision_toy", "speed.precision=bfloat16"], "PN-bfloat16"),
        (
            ["+experiment=precision_toy", "speed.precision=bfloat16", "evaluation.beam=2"],
            "PN-bfloat16+evaluation.beam=2",
        ),
    ],
)
def test_a_label_names_what_departs_from_the_configuration(overrides, label) -> None:
    made = composed("norm=power", *overrides)
    assert made.label == label
    assert made.tracking.name == f"{label}-seed{made.seed}"
    parts = [part for part in label.split("+") if not part.startswith("evaluation.beam")]
    assert made.run_dir.name == f"{'+'.join(parts)}-seed{made.seed}", "one training per folder"


def test_the_environment_is_named_as_well(monkeypatch) -> None:
    monkeypatch.setenv("NORMEXP_KERNELS", "plain")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert composed("norm=power").label == "PN+distributed.ranks=2+speed.kernels=plain"
    assert composed("norm=power", "speed.kernels=auto").label == "PN+distributed.ranks=2"


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        (["task=iwslt14"], None),
        (["task=iwslt14", "fairseq.optimization.lr=[0.01]"], None),
        (
            ["task=iwslt14", "fairseq.optimization.max_epoch=1"],
            "fairseq.optimization.max_epoch=1 instead of 200",
        ),
        (
            ["task=iwslt14", "fairseq.model.encoder.layers=2", "fairseq.model.dropout=0"],
            "fairseq.model.encoder.layers=2 instead of 6",
        ),
        (["task=iwslt14", "evaluation.beam=1"], "evaluation.beam=1 instead of 5"),
        (["task=iwslt14", "model=wmt_big"], "model=wmt_big instead of iwslt_small"),
        (
            ["task=multi30k", "fairseq.optimization.max_epoch=1"],
            "small model (2+2 layers, d 128), 1 epochs, one CPU core; "
            "fairseq.optimization.max_epoch=1 instead of 6",
        ),
        (["task=multi30k", "budget=half"], "half"),
        # Words of one's own may take the place of the task's, but nothing makes it the paper's.
        (
            ["task=toy_translation", "budget=null"],
            "budget=null instead of toy corpus, tiny model, minutes on a CPU",
        ),
        (
            ["task=toy_translation", "task.budget=null"],
            "task.budget=null instead of toy corpus, tiny model, minutes on a CPU",
        ),
        (["task=multi30k"], "small model (2+2 layers, d 128), 6 epochs, one CPU core"),
    ],
)
def test_what_shortens_or_shrinks_marks_itself(overrides, budget) -> None:
    assert marked_budget(composed(*overrides)) == budget


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("norm=[layer,power]", r"norm=\[A,B\] would be one run.* sweep: -m norm=A,B"),
        ("model=[translation_tiny,translation_small_cpu]", "would be one run"),
        # A power norm under LN's label would be the baseline of the others.
        ("norm.name=power", "norm.name=power: .* those of layer; choose the norm by norm=power"),
        ("norm={name: power}", "choose the norm by norm=power"),
    ],
)
def test_a_label_is_of_one_norm(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed("norm=layer", override)


def test_one_number_in_two_forms_is_one_configuration() -> None:
    forms = ["norm.options.alpha_fwd=1", "evaluation.length_penalty=0", "norm.options.eps=1"]
    others = [
        "norm.options.alpha_fwd=1.0",
        "evaluation.length_penalty=-0.0",
        "norm.options.eps=1e0",
    ]
    one, other = composed("norm=power", *forms), composed("norm=power", *others)
    assert one == other and config_hash(one) == config_hash(other)


NAMES = st.sampled_from(["norm.options.a", "norm.options.b", "fairseq.x.lr", "evaluation.beam"])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.lists(st.integers() | st.text(max_size=5), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
CHANGES = st.dictionaries(NAMES, VALUES, max_size=4)


def suffix(changes: dict) -> str:
    return _suffix([Departure(key, value, None) for key, value in sorted(changes.items())])


@settings(max_examples=300, derandomize=True)
@given(CHANGES, CHANGES)
def test_different_settings_have_different_names(one: dict, other: dict) -> None:
    """But for a list of one value, which fairseq takes for the value."""
    assert re.fullmatch(r"[A-Za-z0-9_.+=-]{0,70}", suffix(one))

    def plain(changes: dict) -> str:
        return repr(
            {
                key: value[0] if isinstance(value, list) and len(value) == 1 else value
                for key, value in sorted(changes.items())
            }
        )

    assert (suffix(one) == suffix(other)) == (plain(one) == plain(other))


def test_a_long_name_follows_what_it_cannot_show() -> None:
    many = {f"fairseq.model.setting_of_some_length_{number}": number for number in range(9)}
    last = next(reversed(many))
    names = {suffix(many), suffix(many | {last: 1000}), suffix(dict(list(many.items())[:-1]))}
    assert len(names) == 3
    assert all(re.fullmatch(r".{1,70}", name) and "+others=" in name for name in names)


def test_each_label_has_a_path_of_its_own(tmp_path) -> None:
    labels = ["PN", "PN-", "PN--", "PN+a=1", "PN+a=1-seed1", "PN_", "PN."]
    assert len({path_of_run(tmp_path, "t", label, 1) for label in labels}) == len(labels)


def test_the_arms_of_an_experiment_depart_from_nothing() -> None:
    experiment = ["+experiment=table2_ptb_tensorized", "norm=power_released", "seed=2"]
    for arm in ("published", "causal"):
        settings = composed(*experiment, f"fairseq.model.attention={arm}")
        assert (settings.label, settings.departures) == (f"PN-released-{arm}", [])
        assert marked_budget(settings) is None
    other = composed(
        *experiment, "fairseq.model.attention=published", "fairseq.model.decoder_layers=1"
    )
    assert other.departures == ["fairseq.model.decoder_layers=1 instead of 3"]
    precise = composed("+experiment=precision_toy", "norm=power", "speed.precision=bfloat16")
    assert precise.departures == []
    assert composed("task=multi30k", "speed.precision=bfloat16").departures != []
