"""The MLflow model registry: versions, their tags, their aliases, and models out of it.

Aliases say what a version is for: ``champion`` is what applications load, ``previous`` was it before, ``challenger``
is the newest that was not better. MLflow moves an alias without looking, so choosing and moving happens under
:func:`registry_lock`. All MLflow imports are inside the functions: ``deconv plan`` asks :func:`weights_tag` and must
not wait for them.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, InfraError
from pipelines.files import file_lock, one_line
from pipelines.tracking import STEP_TAG, connected, registry_uri, shown, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from tokenizers import Tokenizer

    from deconv_model.language_model import LanguageModel

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
WEIGHTS_TAG = "deconv.weights_sha256"
TOKENIZER_TAG = "deconv.tokenizer_sha256"
VERIFIED_TAG = "deconv.verified"

_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/:@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/:@]+))?")
_DELETED_STAGE = "Deleted_Internal"


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the registry whose files were read.

    Attributes:
        name: Name of the registered model.
        version: Number of the version.
        aliases: What points to it.
        run_id: MLflow run that made it.
        tags: Its tags, lineage among them.
        end_of_document: Id of the token that ends a document and stands before each.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    run_id: str | None
    tags: Mapping[str, str]
    end_of_document: int

    @property
    def uri(self) -> str:
        """The address that MLflow loads."""
        return f"models:/{self.name}/{self.version}"


@contextmanager
def registry_lock() -> Iterator[None]:
    """Let one process at a time choose and move aliases; on other registries than sqlite nothing can be locked."""
    database = sqlite_file(registry_uri())
    if database is None:
        yield
    else:
        with file_lock(database.with_name(f"{database.name}.aliases.lock")):
            yield


def find_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version that an alias points to, ``None`` where there is no such model or alias."""
    from mlflow import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_or_create_version(
    client: MlflowClient,
    name: str,
    identity: str,
    *,
    model_id: str,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
) -> ModelVersion:
    """Return the one version of a name that a step's output stands for.

    Args:
        client: From :func:`pipelines.tracking.connected`.
        name: Name of the registered model; made if it is new.
        identity: What the version is found again by; it carries it as the tag ``deconv.step``.
        model_id: Logged model that a new version is made of.
        run_id: MLflow run that logged it.
        tags: Lineage of a new version; that of an old one never changes.
        description: What people read beside a new version.
    """
    from mlflow import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}' and tag.`{STEP_TAG}` = '{identity}'", max_results=1)
    if not found:
        # With its tags in one transaction: a version that exists can always be found again.
        return client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags={STEP_TAG: identity, **tags},
            description=description,
            model_id=model_id,  # a server refuses the address without it, a database does not
        )
    return found[0]


def set_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Point an alias to a version."""
    client.set_registered_model_alias(name, alias, version)


def move_aliases(client: MlflowClient, name: str, version: str, alias: str) -> None:
    """Give a version its alias; call it under :func:`registry_lock`.

    A new champion is set last, so that a kill in between leaves the old one in place and the choice is made again.

    Args:
        client: From :func:`pipelines.tracking.connected`.
        name: Name of the registered model.
        version: The version that was verified.
        alias: ``champion`` or ``challenger``.
    """
    if alias == CHAMPION:
        champion = find_alias(client, name, CHAMPION)
        if champion is not None and str(champion.version) != str(version):
            set_alias(client, name, PREVIOUS, str(champion.version))
        set_alias(client, name, CHAMPION, version)
        challenger = find_alias(client, name, CHALLENGER)
        if challenger is not None and str(challenger.version) == str(version):
            client.delete_registered_model_alias(name, CHALLENGER)
    else:
        set_alias(client, name, alias, version)


def weights_tag(name: str, version: str) -> str | None:
    """Return the digest of the weights that a version says it has, ``None`` where there is no such version.

    Makes no database where there is none.

    Raises:
        InfraError: The registry does not answer: whether the version is there cannot be told.
    """
    database = sqlite_file(registry_uri())
    if database is not None:
        if not database.is_file():
            return None
        # A look into the file instead of MLflow, which takes two seconds to start.
        query = (
            "SELECT tags.value FROM model_version_tags AS tags JOIN model_versions AS versions USING (name, version) "
            "WHERE tags.key = ? AND name = ? AND version = ? AND versions.current_stage != ?"
        )
        try:
            # Writable, because a journal that a killed run left must be rolled back before anything can be read.
            with closing(
                sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=30)
            ) as connection:
                row = connection.execute(query, (WEIGHTS_TAG, name, int(version), _DELETED_STAGE)).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None  # a database that nobody has registered anything in yet
            raise InfraError(f"the registry {shown(registry_uri())} cannot be read: {error}") from error
        except sqlite3.Error as error:
            raise InfraError(f"the registry {shown(registry_uri())} cannot be read: {error}") from error
        return row[0] if row else None
    from mlflow import MlflowException

    with connected() as client:
        try:
            return client.get_model_version(name, version).tags.get(WEIGHTS_TAG)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def load_registered(reference: str, device: str = "cpu") -> tuple[LanguageModel, Tokenizer, RegisteredModel]:
    """Load weights and tokenizer of a registered version.

    Args:
        reference: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; ``models:/`` may be left out, and ``NAME`` alone
            is its champion.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, its tokenizer (for which text that spells a special token is text), and what is
        known of the version.

    Raises:
        ConfigError: There is no such model, version or alias, or it was not made by this pipeline.
        InfraError: The registry cannot be reached.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"{reference!r} is not a registered model: write NAME@champion or models:/NAME/VERSION")
    name, number, alias = match["name"], match["version"], match["alias"] or CHAMPION
    where = f"in the registry at {shown(registry_uri())}"
    asked = f"version {number} of {name!r}" if number else f"{name!r} with the alias {alias!r}"
    database = sqlite_file(registry_uri())
    if database is not None and not database.is_file():
        raise ConfigError(f"there is no {asked} {where}: nothing was registered there yet; `deconv run` does that")
    with connected() as client:
        found = _get_version(client, name, number) if number else find_alias(client, name, alias)
        if found is None:
            raise ConfigError(f"there is no {asked} {where}{_what_there_is(client, name)}")
        return _load_version(client, found, device)


def _get_version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _what_there_is(client: MlflowClient, name: str) -> str:
    """Return the end of a sentence that says what could have been asked for."""
    from mlflow import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException:
        names = sorted(model.name for model in client.search_registered_models())
        return f"; registered are {', '.join(names)}" if names else ": nothing is registered; `deconv run` does that"
    aliases = [f"{alias} (version {version})" for alias, version in sorted(model.aliases.items())]
    return f"; its aliases are {', '.join(aliases)}" if aliases else "; it has no aliases"


def _load_version(
    client: MlflowClient, version: ModelVersion, device: str
) -> tuple[LanguageModel, Tokenizer, RegisteredModel]:
    import mlflow

    from deconv_model.saving import load_model

    with tempfile.TemporaryDirectory(prefix="deconv-model-") as folder:
        uri = f"models:/{version.name}/{version.version}"
        try:
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
            flavor = mlflow.models.Model.load(str(local)).flavors["python_function"]
            end_of_document = int(flavor["config"]["end_of_document"])
            files = local / flavor["artifacts"]["model"]["path"]
        except (OSError, mlflow.MlflowException) as error:
            raise InfraError(f"the files of {uri} cannot be read: {shown(one_line(error))}") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{uri} cannot be used: it was not registered by this pipeline") from error
        try:
            model, tokenizer = load_model(files, device=device)
        except ValueError as error:
            raise InfraError(f"the files of {uri} are damaged: {one_line(error)}") from error
    tokenizer.encode_special_tokens = True
    # The version found by an alias does not name its aliases on every server; the model does.
    aliases = client.get_registered_model(version.name).aliases
    pointing = tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)))
    info = RegisteredModel(
        version.name, str(version.version), pointing, version.run_id, dict(version.tags), end_of_document
    )
    return model, tokenizer, info
