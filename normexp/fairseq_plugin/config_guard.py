"""Checks of a configuration that came with a file, before fairseq builds anything from it.

`torch.load(weights_only=True)` keeps a checkpoint's pickle from running code, but fairseq evaluates
some of the texts in a checkpoint's configuration as Python (`eval`), such as
`model.adaptive_softmax_cutoff` and `optimizer.adam_betas`. So a configuration is accepted only if

- its groups and names are those that fairseq knows, and each value has its field's type and is one
  of its field's choices;
- a text that fairseq evaluates is a literal: numbers, and tuples, lists and dictionaries of them;
- any other text, were it evaluated all the same, would call, index and import nothing;
- it holds nothing but numbers, texts, lists and mappings, and no references (`${...}`).

Numbers under names that fairseq does not know are let through: fairseq ignores them, and
checkpoints of its other versions hold some.
"""

import argparse
import ast
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.errors import UserError

EVALUATED = frozenset(
    """
    adafactor_eps adam_betas adamax_betas adaptive_input_cutoff adaptive_softmax_cutoff
    character_filters conv_aggregator_layers conv_feature_layers conv_layers decoder_attention
    decoder_xformers_att_config downsample encoder_attention encoder_xformers_att_config
    feature_encoder_spec gated_attention input_layers lamb_betas latent_temp left_pad_source
    left_pad_target optimizer_overrides model_overrides pipeline_balance
    pipeline_decoder_balance pipeline_decoder_devices pipeline_devices pipeline_encoder_balance
    pipeline_encoder_devices pretrained project_input self_attention wer_args
    xformers_att_config decoder_layers encoder_layers
    """.split()  # noqa: SIM905
)
"""Names of settings whose texts fairseq evaluates; tests/fairseq_plugin looks for others."""

FREE = frozenset(
    """
    data save_dir restore_file finetune_from_model continue_once tensorboard_logdir log_file
    wandb_project aim_repo aim_run_hash path results_path input_dict target_dict
    """.split()  # noqa: SIM905
)
"""Names of paths and titles: they may look like anything and are never evaluated."""

_NESTED, _VALUES, _REPEATED = 16, 100_000, 1000
_MAPPINGS = (Mapping, argparse.Namespace, DictConfig)
_CONTAINERS = (list, tuple, *_MAPPINGS)


def check_checkpoint(state: Mapping[str, Any]) -> None:
    """Check what a checkpoint holds as configuration, `cfg` or, in older ones, `args`.

    Raises UserError naming the setting.
    """
    args, cfg = state.get("args"), state.get("cfg")
    if args is not None:
        if not isinstance(args, argparse.Namespace):
            raise UserError(f"its args are no namespace but {type(args).__name__}")
        _check_flat("args", vars(args))
    if cfg is not None:
        if isinstance(cfg, DictConfig):
            cfg = OmegaConf.to_container(cfg, resolve=False)
        if not isinstance(cfg, Mapping):
            raise UserError(f"its cfg is no mapping but {type(cfg).__name__}")
        check_groups(cfg)


def check_groups(cfg: Mapping[str, Any]) -> None:
    """Check a configuration of fairseq's in its groups: `model`, `task`, `optimizer`, ...

    Raises UserError naming the setting, as "model.adaptive_softmax_cutoff".
    """
    _check_plain("", cfg)
    registries = {
        "model": MODEL_DATACLASS_REGISTRY,
        "task": TASK_DATACLASS_REGISTRY,
        **{group: registry["dataclass_registry"] for group, registry in REGISTRIES.items()},
    }
    for group, values in cfg.items():
        if group not in FairseqConfig.__dataclass_fields__:
            if isinstance(values, (str, *_CONTAINERS)):
                raise UserError(f"{group} is none of the groups of fairseq's configuration")
        elif isinstance(values, argparse.Namespace):  # of a model or task without a dataclass
            _check_flat(group, vars(values))
        elif group in registries and values is not None:
            _check_choice(group, registries[group], values)
        elif isinstance(values, Mapping):
            _check_fields(group, FairseqConfig.__dataclass_fields__[group].type, values)
        elif values is not None and group != "_name":
            raise UserError(f"{group}={values!r} must be a group of settings")


def _check_choice(group: str, dataclasses: Mapping[str, type], values: Any) -> None:
    """Check a group whose fields depend on what is chosen by `_name`."""
    given = values if isinstance(values, Mapping) else {"_name": values}
    name = given.get("_name")
    if not isinstance(name, str | None):
        raise UserError(f"{group}._name={name!r} is no name")
    if group == "model":
        known = {*MODEL_DATACLASS_REGISTRY, *ARCH_MODEL_REGISTRY}
        dataclass = dataclasses.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    else:
        known = {
            *dataclasses,
            *(TASK_REGISTRY if group == "task" else REGISTRIES[group]["registry"]),
        }
        dataclass = dataclasses.get(name)
    if name is not None and name not in known:
        raise UserError(f"{group}._name={name!r} is unknown; does it need another --user-dir?")
    if dataclass is None:
        _check_flat(group, given)
    else:
        _check_fields(group, dataclass, given)


def _check_fields(group: str, dataclass: type, values: Mapping[str, Any]) -> None:
    """Check the names, types and choices of a group by its dataclass."""
    known = {field.name for field in fields(dataclass)} | {"_name"}
    for name, value in values.items():
        if name not in known and isinstance(value, (str, *_CONTAINERS)):
            raise UserError(f"{group}.{name}={value!r}: fairseq has no such setting")
    given = {name: value for name, value in values.items() if name in known - {"_name"}}
    schema = OmegaConf.structured(dataclass)
    if _refusal(schema, given):  # it does not name the setting in every case
        for name, value in given.items():
            if reason := _refusal(schema, {name: value}):
                raise UserError(f"{group}.{name}={value!r}: {reason}")


def _refusal(schema: DictConfig, values: dict[str, Any]) -> str | None:
    try:
        OmegaConf.merge(schema, values)
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        return str(error).strip().split("\n")[0]
    return None


def _check_flat(where: str, values: Mapping[str, Any]) -> None:
    """Check the arguments of a command line, by the options of its model and task."""
    _check_plain(where, values)
    arch, task = values.get("arch", values.get("_name")), values.get("task")
    if not isinstance(arch, str | None) or not isinstance(task, str | None):
        raise UserError(f"{where}.arch={arch!r} and task={task!r} must be names")
    classes = [ARCH_MODEL_REGISTRY.get(arch), TASK_REGISTRY.get(task)]
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for owner in filter(None, classes):
        owner.add_args(parser)
    for option in parser._actions:
        value = values.get(option.dest)
        expected = {int: int, float: int | float}.get(option.type)
        if option.nargs == 0:
            expected = bool
        elif option.nargs is not None:
            continue
        if value is None:
            continue
        if option.choices is not None and value not in option.choices:
            known = ", ".join(map(str, option.choices))
            raise UserError(f"{where}.{option.dest}={value!r}; known: {known}")
        if expected is not None and not isinstance(value, expected):
            raise UserError(f"{where}.{option.dest}={value!r} is not of the type of this setting")


def _check_plain(where: str, values: Mapping[str, Any]) -> None:
    """Check that there are only numbers, texts, lists and mappings, and that no text can act."""
    for count, (key, name, value) in enumerate(_leaves(where, "", values, 0)):
        if count > _VALUES:
            raise UserError(f"it has more than {_VALUES} settings")
        if not isinstance(value, str):
            continue
        if "${" in value:
            raise UserError(f"{key}={value!r}: references are not allowed in a file")
        if name in EVALUATED and not _is_literal(value):
            raise UserError(
                f"{key}={value[:200]!r} is not a number or a list of numbers; fairseq would run it "
                "as Python"
            )
        if name not in EVALUATED | FREE and not _is_inert(value):
            raise UserError(f"{key}={value[:200]!r} is Python code and no value of this setting")


def _leaves(key: str, name: str, value: Any, depth: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (full key, last name of it, value) of every single value."""
    if depth > _NESTED:
        raise UserError(f"{key} is nested too deeply")
    if isinstance(value, _MAPPINGS):
        if isinstance(value, DictConfig):
            value = OmegaConf.to_container(value, resolve=False)
        items = vars(value) if isinstance(value, argparse.Namespace) else value
        for part, item in items.items():
            if not isinstance(part, str):
                raise UserError(f"{key} has the name {part!r}, which is no text")
            yield from _leaves(f"{key}.{part}".removeprefix("."), part, item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(key, name, item, depth + 1)
    elif value is None or type(value) in (bool, int, float, str):
        yield key, name, value
    else:
        raise UserError(f"{key} is a {type(value).__name__}, which is no value of a setting")


def _is_literal(text: str) -> bool:
    tree = _parsed(text)
    return isinstance(tree, ast.expr) and _is_harmless(tree, names=False)


def _is_inert(text: str) -> bool:
    tree = _parsed(text)
    return tree is None or (isinstance(tree, ast.expr) and _is_harmless(tree, names=True))


def _parsed(text: str) -> ast.expr | bool | None:
    """Return the expression that `eval` would evaluate, None if none, False if it is too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in texts
            return ast.parse(text.lstrip(" \t"), mode="eval").body  # as eval does
    except (SyntaxError, ValueError):
        return None
    except (MemoryError, RecursionError):
        return False


def _is_harmless(node: ast.expr, names: bool) -> bool:
    """Whether evaluating an expression does nothing and takes no time.

    names: whether it may hold names, as a text does that happens to be an expression ("de-en").
    """
    match node:
        case ast.Constant():
            return True
        case ast.Name():
            return names
        case ast.Attribute(value=owner):
            return names and _is_harmless(owner, names)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _is_harmless(operand, names)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return all(_is_harmless(part, names) for part in parts)
        case ast.Dict(keys=keys, values=values):
            return all(part is not None and _is_harmless(part, names) for part in keys + values)
        # the layers of a convolutional model: [(512, 3)] * 15 + [(1024, 1)]
        case ast.BinOp(left=ast.List() as parts, op=ast.Mult(), right=ast.Constant(value=int(n))):
            return n <= _REPEATED and _is_harmless(parts, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if not names:
            return all(
                isinstance(part, ast.List | ast.BinOp) and _is_harmless(part, names)
                for part in (left, right)
            )
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Div(), right=right):
            return _is_harmless(left, names) and _is_harmless(right, names)
    return False
