"""The cures for command lines that Hydra does not understand are right: they work when followed."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from normexp.config.composition_errors import explained
from normexp.paths import CONFIGS


def message(*overrides: str) -> str:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        with pytest.raises(HydraException) as raised:
            compose("train", list(overrides))
        return explained(raised.value, ["scripts/train.py", *overrides])


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("evaluation.bem=3", "evaluation.beam"),
        ("evaluation.lenght_penalty=1", "evaluation.length_penalty"),
        ("evalation.beam=3", "evaluation.beam"),
        ("nrom=power", "norm"),
        ("sed=2", "seed"),
        ("data.locale=x", "data.local"),
        ("norm.options.alpha_fw=0.9", "norm.options.alpha_fwd"),
        ("fairseq.optimization.max_epochs=3", "fairseq.optimization.max_epoch"),
        # without the groups that they stand in
        ("lr=0.1", "fairseq.optimization.lr"),
        ("max_tokens=100", "fairseq.dataset.max_tokens"),
        ("beam=3", "evaluation.beam"),
        # of fairseq, and not in configs/
        ("fairseq.model.layernorm_embeding=true", "+fairseq.model.layernorm_embedding"),
        ("fairseq.optimization.sentence_averag=true", "+fairseq.optimization.sentence_avg"),
    ],
)
def test_a_mistyped_key_leads_to_the_one_that_is_meant(mistyped: str, meant: str) -> None:
    said = message("task=ptb", "norm=power", mistyped)
    key = mistyped.partition("=")[0]
    assert said.startswith(f"{key} is unknown; did you mean ") and f"+{key}" not in said
    guesses = said.partition("did you mean ")[2].rstrip("?").split(" or ")
    assert meant in guesses
    if "=" in mistyped and "." in meant:
        value = mistyped.partition("=")[2]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            assert compose("train", ["task=ptb", "norm=power", f"{meant}={value}"])


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("ptb", "fairseq.optimization.sentence_avg=true"),
        ("ptb", "fairseq.common.fp16=true"),
        ("ptb", "fairseq.model.tie_adaptive_weights=true"),
        ("toy_translation", "fairseq.model.encoder.layerdrop=0.1"),
        ("toy_translation", "fairseq.criterion.report_accuracy=true"),
        ("ptb", "fairseq.distributed_training.ddp_backend=no_c10d"),
    ],
)
def test_a_key_of_fairseqs_that_needs_a_plus_is_told_with_the_command(task: str, key: str) -> None:
    said = message(f"task={task}", key, "seed=3")
    assert said.endswith(f"needs a +: python scripts/train.py task={task} +{key} seed=3")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose("train", [f"task={task}", f"+{key}", "seed=3"])


@pytest.mark.parametrize(
    ("mapping", "cure"),
    [
        (
            "fairseq.optimizer={_name:nag,momentum:0.9}",
            ("fairseq.optimizer={_name:nag}", "+fairseq.optimizer.momentum=0.9"),
        ),
        (
            "fairseq.optimization={sentence_avg:true,max_epoch:2}",
            ("fairseq.optimization={max_epoch:2}", "+fairseq.optimization.sentence_avg=true"),
        ),
    ],
)
def test_a_key_that_a_mapping_cannot_add_is_told(mapping: str, cure: tuple[str, str]) -> None:
    said = message("task=ptb", mapping)
    key = cure[1].partition("=")[0]
    assert said.endswith(f"give it apart, {key}=VALUE") and "did you mean" not in said
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose("train", ["task=ptb", *cure])


@pytest.mark.parametrize("word", ["norm", "power"])
def test_a_bare_word_is_no_setting(word: str) -> None:
    assert message(word).startswith(f"{word}: expected KEY=VALUE")


def test_a_home_folder_is_given_in_full(monkeypatch) -> None:
    """A shell does not expand ~ behind KEY=, and quoted it would be a folder of that name."""
    monkeypatch.setenv("HOME", "/home/me")
    assert message("results_dir=~/x").endswith("given in full: results_dir=/home/me/x")


def test_an_unlike_key_gets_the_names_beside_it() -> None:
    said = message("evaluation.zzz=1")
    assert said.startswith("evaluation.zzz is unknown; known: ") and "evaluation.beam," in said


def test_a_mistyped_choice_gets_the_nearest_and_all() -> None:
    said = message("norm=powr")
    assert "Could not find 'norm/powr'; did you mean norm=power" in said
    assert said.endswith("scale, unified") and "Search path" not in said and "\n" not in said
    assert message("task=zzzz").endswith("wikitext103, wmt14")


def test_a_value_that_needs_quotes_is_quoted_so_that_it_works() -> None:
    said = message("label=PN (a)")
    assert said.endswith("""'label="PN (a)"'""")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose("train", ['label="PN (a)"']).label == "PN (a)"


def test_two_errors_at_once_do_not_hide_the_first() -> None:
    said = message("evaluation.bem=3", "data.locale=x")
    assert said == "evaluation.bem is unknown; did you mean evaluation.beam?"
