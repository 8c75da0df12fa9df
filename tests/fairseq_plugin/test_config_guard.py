"""Configurations of files: what fairseq could run as code is refused, what it writes is accepted.

The texts here are harmless: they would only compute a number.
"""

import argparse
import ast
import dis
import json
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import fairseq
import pytest
import torch
from fairseq import checkpoint_utils, options
from hydra.version import VersionBase
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from packaging.version import Version
from support.authors_format import arguments, build_model, their_state_dict, write
from support.forked_processes import run
from support.small_runs import composed

from normexp.checkpoints import store
from normexp.checkpoints.released import import_checkpoint
from normexp.config.fairseq_config import typed_config
from normexp.errors import UserError
from normexp.evaluation import causality
from normexp.fairseq_plugin import config_guard
from normexp.fairseq_plugin.config_guard import check_checkpoint, check_groups

PLUGIN = Path(__file__).resolve().parents[2] / "normexp" / "fairseq_plugin"
CODE = [
    "max(2, 3)",
    " max(2, 3)",
    "\t[max(2, 3), 5]",
    "(lambda: 2)()",
    "[n for n in (2, 3)]",
    "{**{}}",
    "'ab'.upper()",
    "(2, 3)[0]",
    "f'{2}'",
    "2**3",
    "[0] * 1000000",
    "[[0] * 900] * 900 * 900",
    "(two := 2)",
    "2 if True else 3",
]
NO_LITERALS = ["1 + 1", "two", "20000;60000", "torch.float32", "2 * 3", ""]


@pytest.fixture
def language_model(
    tmp_path: Path,
    structured_config,
    build_language_model,
    tiny_language_model,
    language_model_data: Path,
) -> Callable[..., Path]:
    """Write a checkpoint of a tiny language model whose configuration has been changed."""

    def make(key: str, value: Any) -> Path:
        model = build_language_model()
        cfg = structured_config(
            model={**tiny_language_model, "tokens_per_sample": 16},
            task={
                "_name": "language_modeling",
                "data": str(language_model_data),
                "tokens_per_sample": 16,
            },
            optimizer={"_name": "adam"},
            criterion={"_name": "cross_entropy"},
        )
        plain = OmegaConf.to_container(cfg)
        *groups, name = key.split(".")
        node = plain
        for group in groups:
            node = node[group]
        node[name] = value
        path = tmp_path / "foreign.pt"
        history = [{"num_updates": 1, "optimizer_name": "a", "lr_scheduler_state": {}}]
        torch.save(
            {
                "cfg": plain,
                "args": None,
                "model": model.state_dict(),
                "optimizer_history": history,
                "extra_state": {"train_iterator": {"epoch": 1}},
            },
            path,
        )
        return path

    return make


@pytest.mark.parametrize("text", CODE + NO_LITERALS)
@pytest.mark.parametrize(
    "key", ["model.adaptive_softmax_cutoff", "model.character_filters", "optimizer.adam_betas"]
)
def test_what_fairseq_evaluates_must_be_a_literal(key: str, text: str) -> None:
    group, name = key.split(".")
    chosen = {"model": "normexp_transformer_lm", "optimizer": "adam"}[group]
    with pytest.raises(UserError, match=rf"^{key}=.* as Python$"):
        check_groups({group: {"_name": chosen, name: text}})


@pytest.mark.parametrize("text", CODE)
def test_code_is_refused_wherever_it_stands(text: str) -> None:
    for cfg in (
        {"model": {"_name": "normexp_transformer_lm", "norm_options": text}},
        {"model": argparse.Namespace(arch="fconv_lm", unknown=text)},
        {"model": argparse.Namespace(arch="fconv_lm", decoder_layers=text)},
        {"task": {"_name": "translation", "eval_bleu_args": text}},
        {"criterion": text},
        {"dataset": {"train_subset": text}},
        {"scoring": {"_name": text}},
    ):
        with pytest.raises(UserError):
            check_groups(cfg)
    with pytest.raises(UserError, match=r"^args\.decoder_attention="):
        check_checkpoint({"args": argparse.Namespace(arch="lstm_lm", decoder_attention=text)})


@pytest.mark.parametrize(
    ("cfg", "message"),
    {
        "reference": ({"dataset": {"train_subset": "${oc.env:HOME}"}}, r"dataset\.train_subset="),
        "wrong type": ({"dataset": {"num_workers": "many"}}, r"dataset\.num_workers='many'"),
        "choice": (
            {"model": {"_name": "normexp_transformer_lm", "activation_fn": "sin"}},
            r"model\.activation_fn='sin'",
        ),
        "choice on a command line": (
            {"model": argparse.Namespace(arch="lstm_lm", decoder_layers="two")},
            r"model\.decoder_layers='two'",
        ),
        "unknown text": ({"dataset": {"plugin": "x"}}, r"dataset\.plugin='x'"),
        "unknown model": ({"model": {"_name": "elsewhere"}}, r"model\._name='elsewhere'"),
        "unknown group": ({"hooks": {"at_exit": "x"}}, "hooks is none of the groups"),
        "no group": ({"common": "x"}, "common='x' must be a group"),
        "bytes": ({"optimizer": {"_name": "adam", "adam_betas": b"1"}}, "is a bytes"),
        "tensor": ({"dataset": {"num_workers": torch.ones(1)}}, "is a Tensor"),
        "name that is no text": ({"dataset": {1: 2}}, "the name 1"),
    }.values(),
)
def test_anything_else_is_refused_by_name(cfg: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_groups(cfg)


def test_bottomless_configurations_are_refused() -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    with pytest.raises(UserError, match="nested too deeply"):
        check_groups({"common": circle})
    many: Any = [0]
    for _ in range(10):  # 10^10 values in eleven lists
        many = [many] * 10
    with pytest.raises(UserError, match="more than"):
        check_groups({"common": {"seed": many}})


def test_numbers_of_other_versions_are_let_through() -> None:
    check_groups({"common": {"seed": 1, "some_switch": True, "some_limit": None}})


# separated by two blanks
FRAGMENTS = (
    "a  1  0.5  't'  (  )  [  ]  {  }  ,  :  .  +  -  *  /  \n  =  if  else  for  in  lambda  not  "
    "and  f'{a}'  @  a(1)  [1]  (2, 3)  {1: 2}  %  \\  #  <  |  await  ...  1e9  a.b"
)
ACTS = ("CALL", "BINARY_SUBSCR", "BINARY_SLICE", "IMPORT", "MAKE_FUNCTION", "FORMAT", "STORE")


@given(st.lists(st.sampled_from([*FRAGMENTS.split("  "), " "]), max_size=8).map("".join))
@settings(max_examples=400, derandomize=True, deadline=None)
def test_the_bytecode_of_accepted_texts_does_nothing(text: str) -> None:
    if not config_guard._is_inert(text):
        return
    try:
        code = compile(text.lstrip(" \t"), "", "eval")
    except (SyntaxError, ValueError):
        return
    done = {instruction.opname for instruction in dis.get_instructions(code)}
    assert not [name for name in done if name.startswith(ACTS)], text


def test_every_setting_that_fairseq_evaluates_is_known() -> None:
    """Arguments of eval and its relatives in fairseq's source, as the last part of their names."""
    evaluating = {"eval", "exec", "eval_str_list", "eval_str_dict", "eval_bool"}
    others = {
        "x",  # utils.eval_*, and options on a command line
        "uf",
        "line.strip()",  # of a data file, codedataset.py: speech
    }
    found = set()
    for path in Path(fairseq.__file__).parent.rglob("*.py"):
        if "examples" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            match node.func:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    method = name == "eval" and isinstance(node.func, ast.Attribute)
                    if name in evaluating and not method:
                        found.add(ast.unparse(node.args[0]))
    assert {name.split(".")[-1] for name in found - others} <= config_guard.EVALUATED
    assert {"args.character_filters", "cfg.adaptive_softmax_cutoff"} <= found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.adaptive_softmax_cutoff", "[max(2, 3), 9]"),
        ("optimizer.adam_betas", "(0.9, min(0.98, 1))"),
        ("model.norm_options", "dict()"),
        ("criterion._name", "max(2, 3)"),
    ],
)
def test_foreign_checkpoints_are_refused_by_name(
    language_model, language_model_data: Path, key: str, value: str
) -> None:
    path = language_model(key, value)
    with pytest.raises(store.Lost, match=rf"foreign\.pt is not to be trusted: {key}="):
        causality.main(path, language_model_data, None, "test", 1, 1, True)
    # what the stock tools call, once the plugin is there
    with pytest.raises(UserError, match=rf"not loaded: {key}="):
        checkpoint_utils.load_model_ensemble_and_task([str(path)])


def test_the_same_checkpoint_unchanged_is_tested(language_model, language_model_data: Path) -> None:
    path = language_model("optimizer.adam_betas", "(0.9, 0.98)")
    assert not causality.main(path, language_model_data, None, "test", 1, 1, True).sees_future


def test_a_user_dir_in_a_checkpoint_is_not_imported(
    language_model, language_model_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "foreign_plugin").mkdir()
    (tmp_path / "foreign_plugin" / "__init__.py").write_text("", encoding="utf-8")
    path = language_model("common.user_dir", str(tmp_path / "foreign_plugin"))
    causality.main(path, language_model_data, None, "test", 1, 1, True)
    assert "foreign_plugin" not in sys.modules


def test_stock_tools_refuse_what_they_would_run(language_model, language_model_data: Path) -> None:
    path = language_model("model.adaptive_softmax_cutoff", "[max(2, 3), 9]")

    def work() -> None:
        os.chdir(path.parent)
        sys.argv = ["fairseq-eval-lm", str(language_model_data), "--user-dir", str(PLUGIN)]
        sys.argv += ["--path", str(path), "--cpu", "--tokens-per-sample", "16"]
        VersionBase.instance().version_base = Version("1.1")  # which another test may have changed
        logging.basicConfig(stream=sys.stdout, level=logging.INFO)
        import_module("fairseq_cli.eval_lm").cli_main()

    done = run(work)
    assert done.returncode != 0
    assert "UserError: a checkpoint was not loaded: model.adaptive_softmax_cutoff=" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_xformers_att_config", "dict(a=1)"),
        ("adam_betas", "(0.9, min(0.98, 1))"),
        ("source_lang", "${oc.env:HOME}"),
        ("arch", "max(2, 3)"),
    ],
)
def test_importing_runs_nothing(tmp_path: Path, name: str, value: str) -> None:
    args = arguments(("power", "power", "layer", "layer"))
    theirs = their_state_dict(build_model(args), args)
    setattr(args, name, value)
    source = write(tmp_path / "theirs.pt", args, theirs)
    with pytest.raises(UserError, match=rf"theirs\.pt: args\.{name}="):
        import_checkpoint(source, tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


def test_a_foreign_run_folder_is_checked_too() -> None:
    changed = composed("task=toy_language_model")
    changed.fairseq["optimizer"]["adam_betas"] = "(0.9, min(0.98, 1))"  # as a file may hold it
    with pytest.raises(UserError, match=r"^fairseq\.optimizer\.adam_betas="):
        typed_config(changed)


ARCHITECTURES = {
    "translation": (
        "transformer transformer_iwslt_de_en transformer_wmt_en_de_big fconv_iwslt_de_en lstm "
        "lightconv_iwslt_de_en normexp_translation_tiny"
    ),
    "language_modeling": (
        "transformer_lm transformer_lm_wiki103 transformer_lm_gpt2_small lstm_lm lightconv_lm "
        "fconv_lm_dauphin_wikitext103 normexp_lm_tiny"
    ),
}


@pytest.mark.parametrize(
    ("task", "arch"),
    [(task, arch) for task in ARCHITECTURES for arch in ARCHITECTURES[task].split()],
)
def test_what_fairseq_writes_is_accepted(task: str, arch: str, command_line_config) -> None:
    flags = ["data (1)/bin", "--task", task, "--arch", arch, "--optimizer", "adam"]
    flags += ["--save-dir", "runs[2]/f(x)", "--lr", "0.001", "--max-tokens", "100"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), flags)
    check_checkpoint({"args": parsed})
    stored = OmegaConf.to_container(command_line_config(*flags), resolve=True, enum_to_str=True)
    check_checkpoint({"cfg": stored})


def test_norm_options_are_json_and_no_python() -> None:
    options_ = json.dumps({"eps": 1e-5, "sync": True, "name": "power", "none": None})
    check_groups({"model": {"_name": "normexp_transformer", "norm_options": options_}})
