"""The settings of a run as one typed object, parsed once from Hydra's configuration.

`parse` is the only place that reads Hydra's configuration; everything behind it takes a
`RunSettings`. Imports neither torch nor fairseq, so that "complete already" is answered at once.

The default of a field here means "as before this setting existed": a configuration file that is
older than the setting lacks it and ran in that way. `config.identity` leaves a field at its default
out of a run's hash. What new runs get is decided by configs/train.yaml, which names every setting.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from yaml import YAMLError

from normexp.config.fairseq_values import in_one_form
from normexp.config.seeding import Seeding, Seeds
from normexp.errors import UserError

Kind = Literal["translation", "language_model"]
S = TypeVar("S", bound=BaseModel)

PLUGIN_MODELS: dict[str, tuple[str, ...]] = {
    "translation": ("normexp_transformer",),
    "language_model": ("normexp_transformer_lm", "normexp_tensorized_lm"),
}
"""fairseq's names of the models that a task of each kind can train."""

FAIRSEQ_TASKS: dict[str, tuple[str, ...]] = {
    "translation": ("translation",),
    "language_model": ("language_modeling", "normexp_language_modeling"),
}
"""fairseq's names of the tasks that belong to each kind."""

FAIRSEQ_GROUPS = (
    *("common", "model", "task", "criterion", "optimizer", "lr_scheduler"),
    *("optimization", "dataset", "checkpoint"),
)
"""Groups of fairseq's configuration that every run has."""

_OF_KIND = "task.kind", "task.name", "fairseq.model._name", "fairseq.task._name"

NOT_IN_IDENTITY = ("data", "results_dir", "run_dir", "tracking", "departures")
"""Settings of a run that do not decide its result."""


LONGEST_NAME = 170
"""Characters of a label or a task's name. Names of files, of 255 bytes, add a seed and a time."""


def _text(value: Any) -> Any:
    """A label such as 0.95 is a number to YAML."""
    return str(value) if type(value) in (int, float) else value


def _without_repetition(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("repeated")
    return values


def _path(value: Any) -> Any:
    """Refuse what Python takes for other folders than a shell: "" and "~/..."."""
    if value == "" or str(value).startswith("~/"):
        raise ValueError("no path")
    return _text(value)


# The description of a field completes the sentence "KEY=VALUE ..." of its error message.
_Flag = Annotated[bool, Field(description="must be true or false")]
_Integer = Annotated[int, Field(description="must be an integer")]
_OptionalInteger = Annotated[int | None, Field(description="must be an integer or null")]
_Count = Annotated[int, Field(ge=1, description="must be an integer of at least 1")]
_Seed = Annotated[int, Field(ge=1, lt=2**31, description="must be an integer from 1 to 2147483647")]
# Lengths of hypotheses are raised to this power, in float32.
_Exponent = Annotated[float, Field(ge=-10, le=10, description="must be a number from -10 to 10")]
_Beam = Annotated[int, Field(ge=1, le=1000, description="must be an integer from 1 to 1000")]
_Epochs = Annotated[int, Field(ge=1, le=10_000, description="must be an integer from 1 to 10000")]
_Tokens = Annotated[
    int, Field(ge=1, le=10_000_000, description="must be an integer from 1 to 10000000")
]
_Path = Annotated[Path, Field(strict=False, description="must be a path"), BeforeValidator(_path)]
_OptionalPath = Annotated[
    Path | None,
    Field(strict=False, description="must be a path or null"),
    BeforeValidator(lambda path: _path(path) if path else None),  # NORMEXP_LOCAL_DATA may be ""
]
_Text = Annotated[str, BeforeValidator(_text), Field(description="must be a text")]
_OptionalText = Annotated[
    str | None, BeforeValidator(_text), Field(description="must be a text or null")
]
_Mapping = Annotated[dict[str, Any], Field(description="must be a mapping such as {}")]
_FileName = Annotated[
    str,
    BeforeValidator(_text),
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$",
        max_length=LONGEST_NAME,
        description="names files: use letters, digits and . _ - + = (no spaces), at most "
        f"{LONGEST_NAME} of them",
    ),
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TaskSettings(_Settings):
    """configs/task: what is trained on. Further keys are there for other settings to refer to."""

    model_config = ConfigDict(extra="allow")

    name: _FileName
    kind: Kind
    corpus: _Text
    budget: _OptionalText


class NormSettings(_Settings):
    """configs/norm: the norm, its options, and the sites that have another one."""

    name: str
    label: _Text
    options: _Mapping
    sites: _Mapping = Field(default_factory=dict)

    def overridden_sites(self) -> dict[str, Any]:
        """Site -> NAME or {name: NAME, option: value}, without the sites that take `name`."""
        return {site: norm for site, norm in self.sites.items() if norm is not None}


class EvaluationSettings(_Settings):
    """How the trained model is evaluated; lengths in tokens."""

    checkpoint: Literal["average", "best", "ema"]
    average_last: _Epochs
    beam: _Beam
    length_penalty: _Exponent
    max_tokens: _Tokens
    context_window: _Integer = 0
    stride: _OptionalInteger = None
    compound_split: _Flag = False
    splits: Annotated[
        list[Annotated[str, Field(pattern=r"^(valid|test|test_[A-Za-z0-9_]+)$")]],
        AfterValidator(_without_repetition),
        Field(
            min_length=1,
            description="; known: valid, test (a list of one or both), and further test sets that "
            "the catalogue has for the corpus",
        ),
    ]


class SpeedSettings(_Settings):
    """The same losses in less time. The defaults are what fairseq does by itself."""

    precision: Literal["float32", "bfloat16"] = "float32"
    fast_dropout: _Flag = False
    fused_loss: _Flag = False
    fused_adam: _Flag = False
    kernels: Literal["auto", "plain", "native", "triton"] = "auto"


class DistributedSettings(_Settings):
    """How many processes train together, and over whose tokens their norms take statistics."""

    ranks: _Count = 1
    statistics: Literal["synchronized", "local"] = "synchronized"

    @property
    def synchronized(self) -> bool:
        return self.statistics == "synchronized"


class DataSettings(_Settings):
    """Where corpora are prepared, and a folder that is searched for archives first."""

    dir: _Path
    local: _OptionalPath = None


class TrackingSettings(_Settings):
    """configs/tracking: W&B."""

    mode: Literal["offline", "online", "disabled"]
    project: _Text
    group: _OptionalText
    name: _Text
    tags: Annotated[list[_Text], Field(description="must be a list of texts")]


class ExperimentSettings(_Settings):
    """Everything that decides the result of a run; a record holds it as `config`."""

    task: TaskSettings
    norm: NormSettings
    seed: _Seed
    seeding: Seeding = "fairseq"
    label: _FileName
    budget: _OptionalText
    evaluation: EvaluationSettings
    speed: SpeedSettings = SpeedSettings()
    distributed: DistributedSettings = DistributedSettings()
    fairseq: _Mapping
    finetuned_from: _OptionalText = None
    """SHA-256 of the checkpoint that fairseq.checkpoint.finetune_from_model names; filled in."""

    @property
    def seeds(self) -> Seeds:
        """The seeds of the run's random generators."""
        return Seeds(self.seed, self.seeding)

    @property
    def save_interval(self) -> int:
        """Epochs between fairseq's checkpoints."""
        return self.fairseq["checkpoint"].get("save_interval") or 1

    @property
    def on_cpu(self) -> bool:
        """Whether the run is to stay on the CPU although there may be a GPU."""
        return bool(self.fairseq["common"].get("cpu", False))

    def experiment(self) -> dict[str, Any]:
        """These settings alone, as a record stores them: JSON types, without paths and tracking."""
        settings = self.model_dump(exclude=set(NOT_IN_IDENTITY))
        settings["fairseq"]["checkpoint"].pop("finetune_from_model", None)  # it is a path
        if self.distributed.ranks == 1:  # with one rank it says nothing
            del settings["distributed"]
        return settings


class RunSettings(ExperimentSettings):
    """A run: the experiment, where its files lie, and where its curves go.

    departures: What the command changed in the configuration that it names, "KEY=VALUE instead of
    VALUE" each; see `config.departures`.
    """

    data: DataSettings
    results_dir: _Path
    run_dir: _Path
    tracking: TrackingSettings
    departures: Annotated[list[str], Field(description="must be a list of texts")] = []

    def as_yaml(self) -> str:
        """The settings as the YAML text that `read` understands."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))

    def with_overrides(self, overrides: list[str]) -> "RunSettings":
        """These settings with others in place of some, given as KEY=VALUE.

        Raises UserError for unknown keys and invalid values.
        """
        changed = OmegaConf.create(self.model_dump(mode="json"))
        for override in overrides:
            try:
                changed.merge_with_dotlist([override])
            except (OmegaConfBaseException, YAMLError) as error:
                raise UserError(f"{override!r}: {first_line(error)}") from None
        return parse(changed)


def parse(cfg: DictConfig) -> RunSettings:
    """The settings in Hydra's configuration, references filled in.

    Raises UserError naming the full key, for a model that does not fit the kind of the task, a
    reference that leads nowhere, an unknown or missing key, and a value of the wrong type or range.
    """
    return parse_resolved(resolved(without_hydra(cfg)))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a configuration without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The settings in plain containers, references filled in.

    Raises UserError for a model that does not fit the kind of the task, which references may take
    for granted, and for a reference that leads nowhere.
    """
    try:
        _check_kind(*(OmegaConf.select(cfg, key) for key in _OF_KIND))
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from None


def parse_resolved(content: Mapping[str, Any]) -> RunSettings:
    """The settings in plain containers without references.

    Raises UserError for an unknown or missing key, a value of the wrong type or range, and a model
    that does not fit the kind of the task.
    """
    content = _with_donor(content)
    if isinstance(content.get("fairseq"), Mapping):
        content["fairseq"] = in_one_form(content["fairseq"])
    settings = validated(RunSettings, content)
    for group in FAIRSEQ_GROUPS:
        if not isinstance(given := settings.fairseq.get(group), Mapping):
            raise UserError(f"fairseq.{group}={given!r} must be a group of fairseq's settings")
    names = (settings.fairseq[group].get("_name") for group in ("model", "task"))
    _check_kind(settings.task.kind, settings.task.name, *names)
    return settings


@functools.lru_cache
def _content_hash(path: Path, *state: int) -> str:
    """Return the SHA-256 of a file; state: what changes when it is written."""
    from normexp.corpora.hashing import file_hash

    return file_hash(path)


def _with_donor(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the hash of the checkpoint that a run begins with.

    A run folder's configuration has it already; the file may have gone since.
    """
    fairseq = content.get("fairseq")
    checkpoint = fairseq.get("checkpoint") if isinstance(fairseq, dict) else None
    path = checkpoint.get("finetune_from_model") if isinstance(checkpoint, dict) else None
    if path is None or content.get("finetuned_from") is not None:
        return dict(content)
    donor = Path(str(path)).absolute()
    try:
        stat = donor.stat()
        content_hash = _content_hash(donor, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"fairseq.checkpoint.finetune_from_model={path} cannot be read: {error.strerror}"
        ) from None
    checkpoint = {**checkpoint, "finetune_from_model": str(donor)}
    fairseq = {**fairseq, "checkpoint": checkpoint}
    return {**content, "fairseq": fairseq, "finetuned_from": content_hash}


def validated(model: type[S], content: Mapping[str, Any]) -> S:
    """The settings in plain containers. Raises UserError with the first thing that is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(_complaint(model, content, error)) from None


def window_stride(tokens_per_sample: int, context_window: int, stride: int | None) -> int:
    """Tokens by which a sliding window moves on; None: as many as the model's windows allow.

    Raises UserError where windows of context_window + stride tokens are impossible.
    """
    stride = tokens_per_sample - context_window if stride is None else stride
    if context_window < 0 or stride < 1 or context_window + stride > tokens_per_sample:
        raise UserError(
            f"evaluation.context_window={context_window} and evaluation.stride={stride}: the first "
            f"must not be negative, the second be at least 1, and their sum at most "
            f"{tokens_per_sample}, the model's tokens_per_sample"
        )
    return stride


def first_line(error: Exception) -> str:
    """The first line of one of OmegaConf's messages, with the key that it is about."""
    lines = str(error).strip().split("\n")
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    return lines[0] + (f" (key {key})" if key and key not in lines[0] else "")


def _check_kind(kind: Any, name: Any, model: Any, task: Any) -> None:
    """Check that model, task and kind fit; the arguments are the settings of `_OF_KIND`."""
    if not isinstance(kind, str) or kind not in PLUGIN_MODELS:
        raise UserError(f"task.kind={kind!r}; known: {', '.join(PLUGIN_MODELS)}")
    if model not in PLUGIN_MODELS[kind]:
        raise UserError(
            f"task={name} is a {kind.replace('_', ' ')} task and needs a model of the "
            f"type {' or '.join(PLUGIN_MODELS[kind])}, but the model is {model!r}; choose another "
            "model= (configs/model/)"
        )
    if task not in FAIRSEQ_TASKS[kind]:
        raise UserError(
            f"fairseq.task._name={task!r} does not fit task.kind={kind}; "
            f"it must be {' or '.join(FAIRSEQ_TASKS[kind])}"
        )


def _complaint(model: type[BaseModel], content: Mapping[str, Any], error: ValidationError) -> str:
    """One sentence about the first error: the full key, its value, and what it may be."""
    first = error.errors(include_url=False)[0]
    key, node, kind = "", content, model
    for name in map(str, first["loc"]):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            if not isinstance(node, Mapping) or name not in node:
                break
            key, node = f"{key}.{name}", node[name]
            continue
        key = f"{key}.{name}".removeprefix(".")
        field = kind.model_fields.get(name)
        if field is None:
            return f"{key} is unknown; known: {', '.join(kind.model_fields)}"
        if name not in node:
            return f"{key} is missing"
        node, kind = node[name], field.annotation
        if get_origin(kind) is Literal:
            return f"{key}={node!r}; known: {', '.join(get_args(kind))}"
        if field.description:
            separator = "" if field.description.startswith(";") else " "
            return f"{key}={node!r}{separator}{field.description}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"{key}={node!r} must be a group with the keys {', '.join(kind.model_fields)}"
    return f"{key}={node!r}: {first['msg']}"
