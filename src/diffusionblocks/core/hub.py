"""Models on the Hugging Face hub: read from a repository, and uploaded to one in a single commit.

`huggingface_hub` does the transport. Its `upload_folder`, and so its mixins, may split a folder over several commits;
a reader in between would get blocks of two models. So a model is uploaded by `create_commit`, all of it or nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.messages import one_line
from .loading import check_digest, check_whole, load
from .model import DiffusionBlocks
from .model_card import CARD, for_repository, is_generated
from .saved_model import CONFIG, INDEX, OURS, SHARED, SavedModel, block_file, read_saved
from .saving import save

if TYPE_CHECKING:
    from huggingface_hub import HfApi


# ---- reading ---------------------------------------------------------------------------------------------------


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> DiffusionBlocks:
    """Load a model from a folder, or from a repository of the Hugging Face hub.

    Of a repository its index is read first, and then the files that the index names: safetensors alone. No code from
    there is run; the original class is looked up by name in the family registry.

    Args:
        name: a folder that a model was saved to, or `user/name` on the hub. A folder of that name comes first.
        revision: branch, tag or commit; default `main`.
        token: of the hub; None takes the one that `hf auth login` or HF_TOKEN left, False none.
        cache_dir: where downloads are kept; default the hub's cache.
        local_files_only: read what is in the cache, and ask the hub nothing.
        device: where to put the model.
        verify: compare each file's SHA-256 with the index.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or it holds no model of blocks.
        ConnectionError: the hub cannot be reached, and the cache has no copy.
        ValueError: what `load` refuses; a token that is not valid; or a `revision` of a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision = {revision!r} is of a repository, and {name} is a folder here: leave it out")
        return load(name, device=device, verify=verify)
    check_name(str(name), "no such folder here, and no name on the hub")
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    with HubErrors(str(name), revision, local_files_only).told():
        index = Path(hf_hub_download(str(name), INDEX, revision=revision, **_library(), **options))
        source = read_saved(index.parent)
        check_whole(source)
        for file in _tensor_files(source):
            # The cache has a folder for each commit: all files are of the one that the index is of.
            hf_hub_download(str(name), file, revision=index.parent.name, **_library(), **options)
    return load(index.parent, device=device, verify=verify)


def _tensor_files(source: SavedModel) -> list[str]:
    """The tensor files of a saved model, named by the numbers of its blocks: no name leads out of the folder."""
    shared = source.blocks_config.shared == "joint" and source.partition.num_blocks > 1
    return [block_file(b) for b in source.blocks] + [SHARED] * shared


# ---- uploading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """What was uploaded.

    Attributes:
        repository: `user/name`.
        address: of the commit.
        files: that the repository now has of the model.
        keeps_card: whether the repository's own model card stayed, which a person wrote.
    """

    repository: str
    address: str
    files: tuple[str, ...]
    keeps_card: bool


def push_to_hub(
    model: DiffusionBlocks | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> Upload:
    """Upload a model to a repository of the Hugging Face hub, which is made if need be, in one commit.

    A folder is uploaded as it is, but for hidden files: with its model card, tokenizer and whatever lies beside them.
    Blocks of an older model that the new one lacks are deleted there in the same commit.

    Args:
        model: blocks, or the folder that they were saved to (of a run, RUN/model), whose card says more.
        repo_id: `user/name`; without `user/`, of the token's account.
        private: whether a new repository is private; None: as the account has it.
        token: of the hub, with permission to write; None takes the one that `hf auth login` or HF_TOKEN left.
        commit_message: of the commit.

    Raises:
        FileNotFoundError: the folder holds no model.
        ConnectionError: the hub cannot be reached.
        ValueError: some blocks only, or files that are not those of the index; no token, or one that may not write
            there; a public repository where `private` is True; or one that changed meanwhile.
    """
    check_name(repo_id, "no name on the hub")
    if isinstance(model, DiffusionBlocks):
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model")
            return _push(Path(folder) / "model", repo_id, private, token, commit_message)
    return _push(Path(model), repo_id, private, token, commit_message)


def _push(
    folder: Path, repo_id: str, private: bool | None, token: str | bool | None, commit_message: str | None
) -> Upload:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if (folder / CONFIG).is_file() and not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} holds a model of its own library and no blocks: upload it with `hf upload {repo_id} {folder}`"
        )
    source = read_saved(folder)
    check_whole(source)
    for name in _tensor_files(source):
        check_digest(source, name)
    files = _files_of(folder)
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise ValueError(
            f"uploading to {repo_id} takes a token of the hub with permission to write: log in with `hf auth login`, "
            "set HF_TOKEN, or give token"
        )
    api = HfApi(token=token, **_library())
    with HubErrors(repo_id).told():
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.model_info(repository)
        if private and not info.private:
            raise ValueError(
                f"{repository} is there already and public, and private is of new repositories: change its visibility "
                "in its settings on the hub, or leave private out"
            )
        present = {sibling.rfilename for sibling in info.siblings or ()}
        card = _card(api, folder, repository, info.sha if CARD in present else None)
        operations: list[Any] = [
            CommitOperationAdd(name, card if name == CARD and card is not None else str(path))
            for name, path in files.items()
            if name != CARD or card is not None
        ]
        stale = sorted(name for name in present - files.keys() if OURS.fullmatch(name))
        operations += [CommitOperationDelete(name) for name in stale]
        message = commit_message or f"Upload {source.model_class} as {source.partition.num_blocks} blocks"
        commit = api.create_commit(repository, operations, commit_message=message, parent_commit=info.sha)
    return Upload(repository, str(commit.commit_url), tuple(files), CARD in files and card is None)


def _files_of(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of all that a folder holds but for hidden files.

    Raises:
        ValueError: a link that leads out of the folder.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        leads_out = path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())
        if leads_out and not OURS.fullmatch(path.name):  # these are as the index says, wherever they lie
            raise ValueError(f"{path} is a link that leads out of the folder: put the file itself there")
        files[name.as_posix()] = path
    return files


def _card(api: HfApi, folder: Path, repository: str, commit: str | None) -> bytes | None:
    """The card to upload; None where the repository's own stays.

    Args:
        api: of the hub.
        folder: of the model.
        repository: its name.
        commit: whose card is the repository's own; None where it has none.
    """
    if not (folder / CARD).is_file():
        return None
    content = (folder / CARD).read_bytes()
    text = content.decode("utf-8", errors="replace")
    if not is_generated(text):
        return content
    if commit is not None:
        with tempfile.TemporaryDirectory() as cache:
            own = Path(api.hf_hub_download(repository, CARD, revision=commit, cache_dir=cache)).read_bytes()
        if not is_generated(own.decode("utf-8", errors="replace")):
            return None
    return for_repository(text, repository).encode()


# ---- what can go wrong -------------------------------------------------------------------------------------------


def _library() -> dict[str, Any]:
    from .. import __version__

    return {"library_name": "diffusionblocks", "library_version": __version__}


def check_name(name: str, problem: str) -> None:
    """Raise FileNotFoundError unless a repository of the hub may have that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{name}: {problem}: that is user/name, of letters, digits, '-', '_' and '.'") from None


@dataclass(frozen=True)
class HubErrors:
    """What the hub, or the way there, says of a repository, as an error in one line.

    Attributes:
        name: of the repository.
        revision: that was asked for.
        local_files_only: whether the hub was not to be asked.
    """

    name: str
    revision: str | None = None
    local_files_only: bool = False

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Raise errors of the hub's client as errors in one line, with what to do."""
        try:
            yield
        except Exception as error:
            ours = self._in_one_line(error)
            if ours is None:
                raise
            raise ours from None

    def _in_one_line(self, error: BaseException) -> Exception | None:
        """The error to raise for one of the client's; None for any other."""
        from huggingface_hub import errors

        if isinstance(error, RuntimeError):  # of a transfer, which may say why
            why = None if error.__cause__ is None else self._in_one_line(error.__cause__)
            return why or ConnectionError(
                f"{self.name}: the transfer broke off ({one_line(error.__cause__ or error)}): run it again"
            )
        if isinstance(error, errors.GatedRepoError):
            return ValueError(
                f"{self.name} is open only to those who accept its terms: accept them on its page on the hub, and give "
                "a token of that account"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{self.name}: no such folder here, and the hub has no such model, or it is private: check the name, "
                "and give a token of an account that may read it (`hf auth login`, HF_TOKEN)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FileNotFoundError(
                f"{self.name} has no revision {self.revision!r}: give a branch, a tag or a commit of it"
            )
        if isinstance(error, errors.LocalEntryNotFoundError):
            if self.local_files_only:
                return FileNotFoundError(
                    f"{self.name} is not in the cache, or not all of it, and local_files_only = True asks the hub "
                    "nothing: leave it out once, to download it"
                )
            return self._no_answer(error.__cause__ or error)
        if isinstance(error, errors.EntryNotFoundError):
            file = INDEX if INDEX in str(error) else "a file that its index names"
            return FileNotFoundError(
                f"{self.name} on the hub lacks {file}: it holds no whole model that diffusionblocks saved"
            )
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return ValueError(
                    f"the hub refuses the token for {self.name} ({_first(error)}): give a valid one that has "
                    "permission to write there, or to read what is private (`hf auth login`, HF_TOKEN)"
                )
            if status in (409, 412):
                return ValueError(
                    f"{self.name} was changed on the hub while this was uploaded, so nothing was: run it again"
                )
            return self._no_answer(error)
        # The client's own class of all that goes wrong on the way there, of whichever package it is built on.
        network = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        return self._no_answer(error) if isinstance(error, (network, errors.OfflineModeIsEnabled)) else None

    def _no_answer(self, error: BaseException) -> ConnectionError:
        """The error of a hub that cannot be asked, or that answers with an error of its own."""
        from huggingface_hub import constants, errors

        if isinstance(error, errors.HfHubHTTPError):
            return ConnectionError(f"the hub answers {error.response.status_code} for {self.name}: {_first(error)}")
        if isinstance(error, errors.OfflineModeIsEnabled) or constants.is_offline_mode():
            return ConnectionError(
                f"{self.name}: HF_HUB_OFFLINE is set, so the hub is not asked, and the cache has no copy: unset it"
            )
        return ConnectionError(
            f"{self.name}: the hub at {constants.ENDPOINT} cannot be reached ({one_line(error)}): check the network; "
            "what is in the cache is read without it"
        )


def _first(error: Any) -> str:
    """The first line of what the hub said."""
    return one_line(error.server_message or str(error).splitlines()[0])
