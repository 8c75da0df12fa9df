"""A user's own tasks: Hydra finds them, and a run of one is on the text that it names."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from normexp.config.settings import RunSettings
from normexp.paths import own_folder


class OwnConfigs(SearchPathPlugin):
    """Adds ``configs/`` of the own folder behind the project's configs/, which goes first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra whenever it begins to compose."""
        configs = own_folder() / "configs"
        if configs.is_dir():
            search_path.append("normexp-own", f"file://{configs}")


def register() -> None:
    """Tell Hydra of the own configurations; to be called before it composes."""
    Plugins.instance().register(OwnConfigs)


def require_current_corpus(settings: RunSettings) -> None:
    """Raise UserError if an own corpus has changed, even where the run is complete already.

    Its result is of the text as it was, and a user who has changed the text expects another.
    """
    if "@" in settings.task.corpus:  # only then: "complete already" is answered at once
        from normexp.corpora.preparation import find_corpus

        find_corpus(settings.task.corpus)
