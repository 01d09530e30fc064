"""The hub: finding what a model needs, with clear answers where that fails, and pushing models, data and Spaces."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from .cards import Figure

RepoType = Literal["model", "dataset", "space"]

_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "training.json",
    "evaluation.json",
    "ATTRIBUTION.md",
    "LICENSE*",
    "LICENSES/*",
    "adapter/adapter_config.json",
    "adapter/reranker_config.json",
    "adapter/*.safetensors",
)
"""What of a model's folder is pushed. Checkpoints, optimizer states and pickled settings stay where they are."""

_ROWS_A_FILE = 1000
_OWN = ".gitattributes"  # the hub's own file, in every repository from its first commit


class HubError(OSError):
    """Something about the hub that the user can put right. The message says what, and never shows a token."""


def fetch(name: str | Path, filename: str, *, revision: str | None = None, subfolder: str = "") -> Path:
    """
    A file of a model: in its folder, or downloaded once and kept in the hub's cache.

    Args:
        name (`str` or `Path`):
            Folder or hub id.
        filename (`str`):
            The file.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        subfolder (`str`, *optional*, defaults to `""`):
            Folder inside the model's folder or repository.

    Raises:
        `FileNotFoundError`: if there is such a model, and it has no such file.
        `HubError`: if there is no such model, it is gated, or the hub cannot be asked and the cache has no copy.
    """
    if Path(name).is_dir():
        path = Path(name, subfolder, filename)
        if not path.is_file():
            raise FileNotFoundError(f"{Path(name, subfolder)} has no {filename}")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name), filename, revision=revision, subfolder=subfolder or None))
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} has no {'/'.join(filter(None, (subfolder, filename)))}") from error
    except Exception as error:
        raise explained(error, str(name), "model", revision) from error


def find(name: str | Path, filename: str, *, revision: str | None = None, subfolder: str = "") -> Path | None:
    """Like [`fetch`], but `None` where there is no such file, or none in the cache while the hub cannot be asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return fetch(name, filename, revision=revision, subfolder=subfolder)
    except FileNotFoundError:
        return None
    except HubError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def explained(error: Exception, name: str, repo_type: RepoType = "model", revision: str | None = None) -> Exception:
    """
    The error to raise in place of one of the hub's client: what happened to `name`, and what to do about it.

    What has nothing to do with the hub is returned as it is.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client wraps what ends an upload
        error = error.__cause__
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError("there is no token for the hub; log in with `hf auth login`")
    what = {"model": "model", "dataset": "data set", "space": "Space"}[repo_type]
    if isinstance(error, errors.HFValidationError):
        return HubError(f"no such folder, and {name!r} is no name on the hub, where it would be 'owner/name'")
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: ask for access on {constants.ENDPOINT}/{name}, then log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{name} has no revision {revision!r}; see {constants.ENDPOINT}/{name}/branches")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return HubError("the hub does not know the token; log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"no such folder, and the hub shows no {what} {name}; if it is private, log in with `hf auth login`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        return HubError(f"no such folder, and {name} is not in the hub's cache while {why}; load it online once")
    if status == 403:
        return HubError(f"the token may not do this to {name}: {_server_message(error)}")
    if status is not None:
        return HubError(f"the hub answered {status} about {name}: {_server_message(error)}")
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
        return HubError(
            f"the connection to {constants.ENDPOINT} broke off ({type(error).__name__}); do the same again to go on"
        )
    return error


@dataclasses.dataclass
class Remote:
    """
    What the hub has where something is to be pushed.

    Args:
        exists (`bool`):
            Whether there is such a repository.
        sha (`str`, *optional*):
            The last commit of the revision; `None` where there is no such revision.
        private (`bool`, *optional*):
            Whether only its owner sees the repository.
        same (`list[str]`, *optional*):
            Files of the push that are there already, byte for byte.
        other (`list[str]`, *optional*):
            Files that are there and differ, or that the push does not have.
    """

    exists: bool
    sha: str | None = None
    private: bool | None = None
    same: list[str] = dataclasses.field(default_factory=list)
    other: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Push:
    """
    Files that are ready to go to the hub.

    A revision that holds anything else is not touched unless `overwrite` says so. An upload that was cut off goes on
    where it stopped when it is done again.

    Args:
        repo_id (`str`):
            `"owner/name"`.
        repo_type (`str`):
            `"model"`, `"dataset"` or `"space"`.
        folder (`Path`):
            Holds the files and nothing else, `README.md` (the card) among them.
        private (`bool`, *optional*, defaults to `True`):
            Whether a repository that is made for it is seen by its owner only. One that exists stays as it is.
        revision (`str`, *optional*, defaults to `"main"`):
            The branch; made where there is none.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether what the revision holds may be replaced as a whole. Its history stays.
        message (`str`, *optional*):
            The commit's message.

    Raises:
        `ValueError`: if `repo_id` is not of the form `owner/name`.
    """

    repo_id: str
    repo_type: RepoType
    folder: Path
    private: bool = True
    revision: str = "main"
    overwrite: bool = False
    message: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise ValueError(f"{self.repo_id!r} is no name on the hub; write it as owner/name")

    @property
    def files(self) -> dict[str, int]:
        """The paths of the files in the repository, with their sizes in bytes."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    @property
    def card(self) -> str:
        """The card, as it is going to be shown."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def check(self) -> Remote:
        """
        Asks the hub what is there already. Changes nothing.

        Raises:
            `HubError`: if the revision holds something else and may not be overwritten, the token is no good, or the
                hub cannot be reached.
        """
        with self._explained():
            remote = self._look(_api())
        if remote.other and not self.overwrite:
            shown = ", ".join(remote.other[:3]) + (", …" if len(remote.other) > 3 else "")
            raise HubError(
                f"{self.repo_id} holds something else at revision {self.revision} ({shown}): allow it to be "
                "overwritten, or push to another revision"
            )
        return remote

    def upload(self) -> str:
        """
        Makes the repository if there is none, and uploads.

        Returns:
            `str`: address of the commit, or of the repository where it held all of this already.

        Raises:
            `HubError`: as [`Push.check`], and if the upload breaks off; done again, it goes on.
        """
        remote = self.check()
        with self._explained():
            api = _api()
            if not remote.exists:
                sdk = "gradio" if self.repo_type == "space" else None
                api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, space_sdk=sdk)
            is_new = remote.sha is None
            if is_new and self.revision != "main":
                api.create_branch(self.repo_id, branch=self.revision, repo_type=self.repo_type, exist_ok=True)
            prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
            if len(remote.same) == len(self.files) and not remote.other:
                return f"{api.endpoint}/{prefix}{self.repo_id}"
            commit = api.upload_folder(
                repo_id=self.repo_id,
                repo_type=self.repo_type,
                folder_path=self.folder,
                revision=self.revision,
                commit_message=self.message or f"Push {self.repo_type} with vretrver",
                parent_commit=remote.sha,
                delete_patterns="*" if self.overwrite or is_new else None,
            )
        return commit.commit_url

    def _look(self, api: HfApi) -> Remote:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        api.whoami()
        asked: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        try:
            info = api.repo_info(**asked)
        except RepositoryNotFoundError:
            return Remote(exists=False)
        try:
            sha = api.repo_info(**asked, revision=self.revision).sha
        except RevisionNotFoundError:
            return Remote(exists=True, private=info.private)
        entries = api.list_repo_tree(**asked, revision=sha, recursive=True)
        found = {entry.path: entry for entry in entries if hasattr(entry, "blob_id") and entry.path != _OWN}
        if self.repo_type == "space" and list(found) == ["README.md"]:
            found = {}  # every new Space is given one
        same = [path for path, entry in found.items() if path in self.files and self._equals(path, entry)]
        return Remote(True, sha, info.private, same, sorted(set(found) - set(same)))

    def _equals(self, path: str, entry: RepoFile) -> bool:
        from huggingface_hub.utils.sha import git_hash, sha_fileobj

        if entry.size != self.files[path]:
            return False
        with open(self.folder / path, "rb") as file:
            if entry.lfs is not None:
                return sha_fileobj(file).hex() == entry.lfs.sha256
            return git_hash(file.read()) == entry.blob_id

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise explained(error, self.repo_id, self.repo_type, self.revision) from error


@contextlib.contextmanager
def model_push(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    figures: list[Figure] | None = None,
    **options: Any,
) -> Iterator[Push]:
    """
    Makes a model or an adapter ready to be pushed: weights as safetensors, processor, protocol, and a card.

    Args:
        folder (`str` or `Path`):
            What `save_pretrained` or a training stage wrote.
        repo_id (`str`):
            `"owner/name"`.
        license (`str`, *optional*):
            Short name of the licence; that of the model's own card by default.
        figures (`list[Figure]`, *optional*):
            What was measured; `evaluation.json` in the folder by default.
        options:
            Further settings of [`Push`].

    Raises:
        `ValueError`: if the folder holds no model, its weights are not safetensors or incomplete, or nothing says
            under which licence it is.
    """
    from .cards import model_card

    folder = Path(folder)
    _check_model(folder)
    with tempfile.TemporaryDirectory() as staged:
        for pattern in _MODEL_FILES:
            for path in sorted(folder.glob(pattern)):
                if path.is_file():
                    _link(path, Path(staged, path.relative_to(folder)))
        for name in ("training.json", "adapter_config.json", "adapter/adapter_config.json"):
            _hide_places(Path(staged, name))
        model_card(folder, repo_id, license=license, figures=figures).save(Path(staged, "README.md"))
        yield Push(repo_id, "model", Path(staged), **options)


def _hide_places(path: Path) -> None:
    """Keeps the last part of absolute paths and addresses: the rest says how somebody's computer is set up."""

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hide(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [hide(entry) for entry in value]
        is_place = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "http:", "https:")))
        return Path(value).name if is_place else value

    if not path.exists():
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    if (told := hide(record)) != record:
        path.unlink()  # it is a link to the original
        path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def data_push(
    source: str | Path,
    repo_id: str,
    *,
    license: str,
    split: str = "train",
    image_root: str | Path | None = None,
    attribution: str | Path | None = None,
    **options: Any,
) -> Iterator[Push]:
    """
    Makes a data set of queries with candidates and labels ready to be pushed: parquet with every picture in it.

    Args:
        source (`str` or `Path`):
            As [`~vretrver_hf.data.examples.load_examples`] takes it.
        repo_id (`str`):
            `"owner/name"`.
        license (`str`):
            Short name of the licence.
        split (`str`, *optional*, defaults to `"train"`):
            Which split of the source; on the hub it is the only one and called `train`.
        image_root (`str` or `Path`, *optional*):
            Folder that relative picture paths start from.
        attribution (`str` or `Path`, *optional*):
            A text that says whose work the data are; goes along as `ATTRIBUTION.md`.
        options:
            Further settings of [`Push`].

    Raises:
        `ItemError`, `ValueError`: if a row or a picture cannot be read.
    """
    from .cards import data_card
    from .data.examples import load_examples, row_features, to_row
    from .data.published import without_paths

    examples = load_examples(source, split=split, image_root=image_root)
    with tempfile.TemporaryDirectory() as staged:
        _write_parts(Path(staged), (to_row(without_paths(example)) for example in examples), row_features())
        _copy_attribution(attribution, Path(staged))
        card = data_card(examples, repo_id, license=license, attribution=attribution is not None)
        card.save(Path(staged, "README.md"))
        yield Push(repo_id, "dataset", Path(staged), **options)


@contextlib.contextmanager
def trajectories_push(
    folder: str | Path,
    repo_id: str,
    *,
    license: str,
    attribution: str | Path | None = None,
    **options: Any,
) -> Iterator[Push]:
    """
    Makes trajectories ready to be pushed as a data set that the hub's viewer shows, with every picture in it.

    Args:
        folder (`str` or `Path`):
            What `vretrver sample` or [`~vretrver_hf.data.conversations.write_records`] wrote.
        repo_id (`str`):
            `"owner/name"`.
        license (`str`):
            Short name of the licence.
        attribution (`str` or `Path`, *optional*):
            A text that says whose work the pictures are; goes along as `ATTRIBUTION.md`.
        options:
            Further settings of [`Push`].

    Raises:
        `ItemError`, `ValueError`: if a record or a picture cannot be read.
        `FileNotFoundError`: if the folder holds no records.
    """
    from .cards import trajectories_card
    from .data.conversations import read_records
    from .data.published import published_features, to_row

    records = read_records(folder)
    story = Path(folder, "README.md")
    with tempfile.TemporaryDirectory() as staged:
        _write_parts(Path(staged), map(to_row, records), published_features())
        _copy_attribution(attribution, Path(staged))
        card = trajectories_card(
            records,
            repo_id,
            license=license,
            story=story.read_text(encoding="utf-8") if story.is_file() else "",
            attribution=attribution is not None,
        )
        card.save(Path(staged, "README.md"))
        yield Push(repo_id, "dataset", Path(staged), **options)


@contextlib.contextmanager
def space_push(repo_id: str, *, folder: str | Path | None = None, **options: Any) -> Iterator[Push]:
    """
    Makes the Space ready to be pushed: its app, and beside it this package with the bundled model, so that what runs
    there is what ran here.

    Args:
        repo_id (`str`):
            `"owner/name"`.
        folder (`str` or `Path`, *optional*):
            The app; the one that comes with the package by default.
        options:
            Further settings of [`Push`].
    """
    package = Path(__file__).parent
    ignored = ("__pycache__", "*.pyc", ".*")  # hidden files hold keys and uploads
    app, own = shutil.ignore_patterns(*ignored), shutil.ignore_patterns(*ignored, "space")
    with tempfile.TemporaryDirectory() as staged:
        shutil.copytree(_space_folder() if folder is None else folder, staged, dirs_exist_ok=True, ignore=app)
        shutil.copytree(package, Path(staged, package.name), ignore=own)
        yield Push(repo_id, "space", Path(staged), **options)


def _space_folder() -> Path:
    """The app's folder: in an installed package among the assets, in a checkout beside the package."""
    package = Path(__file__).parent
    for folder in (package / "assets" / "space", package.parent / "spaces" / "rerank"):
        if (folder / "app.py").is_file():
            return folder
    raise ValueError("the Space's app is missing; install the package again")


def copy_documents(source: str | Path, folder: str | Path) -> None:
    """Copies what says how a model came about, from the folder it was loaded from to one where it was saved again."""
    for pattern in ("README.md", "training.json", "evaluation.json", "ATTRIBUTION.md", "LICENSE*", "LICENSES/*"):
        for path in Path(source).glob(pattern) if Path(source).is_dir() else []:
            target = Path(folder, path.relative_to(source))
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _check_model(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} has neither config.json nor adapter_config.json, so it holds no model")
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights:
        raise ValueError(f"{folder} has no weights as safetensors, and no others are pushed; save the model again")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shards - weights):
            raise ValueError(f"{folder} lacks weights that {index.name} names: {', '.join(missing)}")


def _link(source: Path, target: Path) -> None:
    """Puts a file in place without copying it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def _copy_attribution(source: str | Path | None, folder: Path) -> None:
    if source is not None:
        shutil.copyfile(source, folder / "ATTRIBUTION.md")


def _write_parts(folder: Path, rows: Iterable[dict[str, Any]], features: datasets.Features) -> None:
    """Writes `data/train-00000.parquet` and so on, none of them so large that it could not be uploaded again."""
    from .data.examples import write_rows

    (folder / "data").mkdir()
    source = iter(rows)
    for number in itertools.count():
        first = next(source, None)
        if first is None:
            break
        part = itertools.chain([first], itertools.islice(source, _ROWS_A_FILE - 1))
        write_rows(folder / "data" / f"train-{number:05}.parquet", part, features)
    if number == 0:
        raise ValueError("there is nothing to push: no rows")


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="vretrver_hf")


def _server_message(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error).splitlines()[0]
    return _without_token(message)


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "hf_…") if token else text
