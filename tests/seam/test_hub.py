"""The hub: what is pushed is loaded again with its bits, in one commit, and what goes wrong is told in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import convert, edit_index, listing, randomise_adaptive, same_states, tiny
from hub_server import Hub, Refusal, card_errors, running_hub, this_process_at
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.core.model_card import CARD, is_generated
from diffusionblocks.core.saved_model import INDEX
from diffusionblocks.data.autoencoder import load_vae
from diffusionblocks.families.libraries import cached_folder

BLOCKS = [f"block-{b:02d}.safetensors" for b in range(3)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, and this process as one that goes there with the token of an account `ann`."""
    with this_process_at(tmp_path, "ann") as server:
        yield server


def blocks(family: str = "vit", *, seed: int = 0, **config: Any) -> db.DiffusionBlocks:
    model = convert(family, seed=seed, **config)
    randomise_adaptive(model, seed=seed)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    blocks().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- there and back ---------------------------------------------------------------------------------------------


_LOADS = """
import sys
import torch
import diffusionblocks as db
from safetensors.torch import save_file
state = db.from_pretrained(sys.argv[1]).state_dict()
save_file({name: tensor.clone() for name, tensor in state.items()}, sys.argv[2])
"""


def test_what_one_process_pushes_another_loads_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "token-of-ann", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

        def python(*arguments: object) -> str:
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

        told = python("-m", "diffusionblocks", "push", folder, "--repo", "ann/tiny", "--private")
        repository = hub.repositories["ann/tiny"]
        assert f"/ann/tiny/commit/{repository.commits[-1][0]}" in told
        assert repository.private
        assert len(repository.commits) == 2  # the hub's own, which is empty, and ours
        assert set(repository.head) == {".gitattributes", CARD, INDEX, "config.json", *BLOCKS}
        hub.requests.clear()
        python("-c", _LOADS, "ann/tiny", tmp_path / "state.safetensors")
        assert same_states(load_file(tmp_path / "state.safetensors"), dict(db.load(folder).state_dict()))
        read = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
        assert read == {INDEX, *BLOCKS}


@pytest.mark.parametrize(("family", "shared"), [("vit", "joint"), ("llama", "replicated"), ("dit", "frozen")])
def test_a_model_comes_back_from_the_hub(family: str, shared: str, hub: Hub) -> None:
    model = blocks(family, shared=shared)
    upload = model.push_to_hub("ann/m", commit_message="the first")
    assert upload.repository == "ann/m"
    assert hub.repositories["ann/m"].messages == ["initial commit", "the first"]
    loaded = db.DiffusionBlocks.from_pretrained("ann/m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.partition == model.partition
    assert card_errors(hub.repositories["ann/m"].head[CARD].decode()) == []
    assert 'db.from_pretrained("ann/m")' in hub.repositories["ann/m"].head[CARD].decode()


def test_a_revision_is_the_model_of_then(hub: Hub) -> None:
    first, second = blocks(seed=1), blocks(seed=2)
    first.push_to_hub("ann/m")
    commit = hub.repositories["ann/m"].commits[-1][0]
    second.push_to_hub("ann/m")
    assert same_states(db.from_pretrained("ann/m", revision=commit).state_dict(), first.state_dict())
    assert same_states(db.from_pretrained("ann/m").state_dict(), second.state_dict())


def test_the_cache_is_read_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = blocks()
    model.push_to_hub("ann/m")
    with pytest.raises(FileNotFoundError, match=r"not in the cache.*local_files_only") as error:
        db.from_pretrained("ann/m", local_files_only=True, cache_dir=tmp_path / "own")
    one_line(error)
    db.from_pretrained("ann/m", cache_dir=tmp_path / "own")
    hub.requests.clear()
    again = db.from_pretrained("ann/m", local_files_only=True, cache_dir=tmp_path / "own")
    assert same_states(again.state_dict(), model.state_dict())
    assert hub.requests == []


def test_a_folder_comes_before_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert same_states(db.from_pretrained("model").state_dict(), db.load(folder).state_dict())
    with pytest.raises(ValueError, match="revision = 'main' is of a repository"):
        db.from_pretrained("model", revision="main")


def test_load_names_from_pretrained() -> None:
    with pytest.raises(FileNotFoundError, match=r"diffusionblocks.from_pretrained\('ann/m'\)"):
        db.load("ann/m")


# ---- one commit, or none ----------------------------------------------------------------------------------------


def test_an_upload_that_breaks_off_leaves_the_model_before(hub: Hub) -> None:
    before = blocks(seed=1)
    before.push_to_hub("ann/m")
    commits = list(hub.repositories["ann/m"].commits)
    uploads = []

    def fails_at_the_second_file(request: str) -> None:
        if request.startswith("PUT"):
            uploads.append(request)
            if len(uploads) > 1:
                raise Refusal(403, message="signature expired")

    hub.failing = fails_at_the_second_file
    with pytest.raises(ValueError, match="signature expired"):
        blocks(seed=2).push_to_hub("ann/m")
    hub.failing = lambda request: None
    assert len(uploads) > 1  # it did begin
    assert hub.repositories["ann/m"].commits == commits
    assert same_states(db.from_pretrained("ann/m").state_dict(), before.state_dict())


def test_blocks_that_a_newer_model_lacks_are_deleted_and_other_files_stay(hub: Hub) -> None:
    blocks(num_blocks=3).push_to_hub("ann/m")
    hub.repositories["ann/m"].head["samples/grid.png"] = b"a picture"
    one = blocks(num_blocks=1)
    one.push_to_hub("ann/m")
    names = {".gitattributes", CARD, INDEX, "config.json", "block-00.safetensors", "samples/grid.png"}
    assert set(hub.repositories["ann/m"].head) == names
    assert len(hub.repositories["ann/m"].commits) == 3
    assert same_states(db.from_pretrained("ann/m").state_dict(), one.state_dict())


def test_a_repository_that_changes_meanwhile_is_not_written(hub: Hub) -> None:
    def another_commit(request: str) -> None:
        if request.startswith("POST /api/models/ann/m/commit"):
            hub.repositories["ann/m"].add({"notes.txt": b"theirs"}, "meanwhile")

    hub.failing = another_commit
    with pytest.raises(ValueError, match="changed on the hub while") as error:
        blocks().push_to_hub("ann/m")
    one_line(error)
    assert hub.repositories["ann/m"].head == {"notes.txt": b"theirs"}


def test_what_lies_beside_the_model_goes_with_it_and_hidden_files_do_not(folder: Path, hub: Hub) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "grid.png").write_bytes(b"a picture")
    (folder / ".notes").write_text("mine")
    db.push_to_hub(folder, "m")  # of the token's account
    assert set(listing(folder)) - {".notes"} == set(hub.repositories["ann/m"].head) - {".gitattributes"}
    (folder / "secret").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"secret is a link that leads out"):
        db.push_to_hub(folder, "ann/m")


# ---- cards ------------------------------------------------------------------------------------------------------


def test_an_edited_card_is_never_replaced(folder: Path, hub: Hub) -> None:
    generated = (folder / CARD).read_text()
    assert is_generated(generated)
    blocks(num_blocks=1).save_pretrained(folder)
    assert (folder / CARD).read_text() != generated  # the positive control
    edited = (folder / CARD).read_text().replace("license: unknown", "license: mit")
    (folder / CARD).write_text(edited)
    blocks().save_pretrained(folder)
    assert (folder / CARD).read_text() == edited
    db.push_to_hub(folder, "ann/m")
    assert hub.repositories["ann/m"].head[CARD].decode() == edited
    (folder / CARD).unlink()
    blocks().save_pretrained(folder)
    assert (folder / CARD).read_text() == generated
    assert db.push_to_hub(folder, "ann/m").keeps_card
    assert hub.repositories["ann/m"].head[CARD].decode() == edited


def test_a_card_is_a_model_card(folder: Path) -> None:
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "diffusionblocks"
    assert card.data.license == "unknown"
    assert card.data.pipeline_tag == "image-classification"
    assert "diffusionblocks" in card.data.tags
    assert 'from_pretrained("user/name")' in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card_errors(str(card)) == []
    assert card_errors(str(card).replace("license: unknown", "license: mine"))  # the positive control


# ---- nothing else is read, and no code is run -------------------------------------------------------------------


def test_only_files_of_the_index_are_read(folder: Path, hub: Hub, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('code from the repository ran')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    db.push_to_hub(folder, "ann/m")
    db.from_pretrained("ann/m", cache_dir=tmp_path / "own")
    files = {path.name for path in (tmp_path / "own").glob("models--ann--m/snapshots/*/*")}
    assert files == {INDEX, *BLOCKS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["files"].update({"../../outside.safetensors": v["files"]["block-00.safetensors"]}), "files"),
        (lambda v: v.update(blocks=["../secret"]), "blocks"),
        (lambda v: v.update(model_class="os.system"), "unknown model class"),
        (lambda v: v["model_config"].update(attn_implementation="somebody/kernels"), "attn_implementation"),
    ],
)
def test_an_index_from_the_hub_leads_nowhere(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path, hub: Hub
) -> None:
    db.push_to_hub(folder, "ann/m")
    edit_index(folder, change)
    hub.repositories["ann/m"].head[INDEX] = (folder / INDEX).read_bytes()
    hub.requests.clear()
    with pytest.raises(ValueError, match=message):
        db.from_pretrained("ann/m")
    assert not [request for request in hub.requests if "safetensors" in request]


def test_a_file_that_was_changed_on_the_hub_is_refused(folder: Path, hub: Hub) -> None:
    db.push_to_hub(folder, "ann/m")
    blocks(seed=3).save_pretrained(folder.parent / "other")
    hub.repositories["ann/m"].head[BLOCKS[1]] = (folder.parent / "other" / BLOCKS[1]).read_bytes()
    with pytest.raises(ValueError, match=rf"{BLOCKS[1]} does not match {INDEX}"):
        db.from_pretrained("ann/m")


# ---- errors -----------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


def test_without_a_token_nothing_is_asked(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"takes a token.*hf auth login.*HF_TOKEN") as error:
        db.push_to_hub(folder, "ann/m")
    one_line(error)
    with pytest.raises(ValueError, match="takes a token"):
        db.push_to_hub(folder, "ann/m", token=False)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("ann/m", "wrong", r"refuses the token for ann/m \(.*Invalid"),
        ("bob/m", "token-of-ann", r"refuses the token for bob/m \(.*rights"),
    ],
)
def test_a_token_that_may_not_write_is_told(repository: str, token: str, message: str, folder: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=message) as error:
        db.push_to_hub(folder, repository, token=token)
    one_line(error)
    assert hub.repositories == {}


def test_a_public_repository_does_not_become_private(folder: Path, hub: Hub) -> None:
    db.push_to_hub(folder, "ann/m")
    with pytest.raises(ValueError, match="ann/m is there already and public") as error:
        db.push_to_hub(folder, "ann/m", private=True)
    one_line(error)
    assert len(hub.repositories["ann/m"].commits) == 2


def test_what_is_not_there_is_told(folder: Path, hub: Hub) -> None:
    db.push_to_hub(folder, "ann/secret", private=True)
    db.push_to_hub(folder, "ann/m")
    for name, token in (("ann/none", None), ("ann/none", False), ("ann/secret", "token-of-bob"), ("ann/secret", False)):
        with pytest.raises(FileNotFoundError, match="the hub has no such model, or it is private") as error:
            db.from_pretrained(name, token=token, cache_dir=folder.parent / "own")
        one_line(error)
    with pytest.raises(FileNotFoundError, match="ann/m has no revision 'v2'") as error:
        db.from_pretrained("ann/m", revision="v2")
    one_line(error)
    del hub.repositories["ann/m"].head[BLOCKS[1]]
    with pytest.raises(FileNotFoundError, match="lacks a file that its index names") as error:
        db.from_pretrained("ann/m")
    one_line(error)
    del hub.repositories["ann/m"].head[INDEX]
    with pytest.raises(FileNotFoundError, match=f"ann/m on the hub lacks {INDEX}"):
        db.from_pretrained("ann/m", cache_dir=folder.parent / "own")
    for name in ("no name", "a/b/c", "../no-such-folder"):
        with pytest.raises(FileNotFoundError, match="no such folder here, and no name on the hub") as error:
            db.from_pretrained(name)
        one_line(error)


def test_no_network_is_told(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before another attempt of the library's
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    for action in (lambda: db.from_pretrained("ann/m"), lambda: db.push_to_hub(folder, "ann/m")):
        with pytest.raises(ConnectionError, match=rf"the hub at {nowhere} cannot be reached \(.*refused") as error:
            action()
        one_line(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for action in (lambda: db.from_pretrained("ann/m"), lambda: db.push_to_hub(folder, "ann/m")):
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set") as error:
            action()
        one_line(error)


def test_some_blocks_are_not_pushed(folder: Path, hub: Hub) -> None:
    blocks().save_pretrained(folder, blocks=[0, 2])
    with pytest.raises(ValueError, match=r"blocks \[1\] are missing.*diffusionblocks merge"):
        db.push_to_hub(folder, "ann/m")
    damaged = folder.parent / "damaged"
    blocks().save_pretrained(damaged)
    (damaged / BLOCKS[0]).write_bytes((folder / BLOCKS[2]).read_bytes())
    with pytest.raises(ValueError, match="does not match"):
        db.push_to_hub(damaged, "ann/m")
    assert hub.requests == []


def test_the_command_says_what_is_wrong(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["push", str(folder.parent / "none"), "--repo", "ann/m"]) == 2
    assert "is missing: give a folder that a converted model was saved to" in capsys.readouterr().err
    tiny().save_pretrained(folder.parent / "library")
    assert main(["push", str(folder.parent / "library"), "--repo", "ann/m"]) == 2
    assert "holds a model of its own library and no blocks: upload it with `hf upload" in capsys.readouterr().err
    assert main(["push", str(folder.parent), "--repo", "ann/m"]) == 0  # the folder of a run, with `model` in it
    assert f"{hub.address}/ann/m/commit/" in capsys.readouterr().out
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(folder), "--repo", "ann/m"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_on_the_hub_are_those_of_any_precision(hub: Hub) -> None:
    model = blocks().to(torch.bfloat16)
    model.push_to_hub("ann/m")
    assert same_states(db.from_pretrained("ann/m").state_dict(), model.state_dict())
    assert json.loads(hub.repositories["ann/m"].head["config.json"])["dtype"] == "bfloat16"


def test_an_autoencoder_out_of_reach_is_told_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the half a minute of attempts that the client makes for each file, and without blaming a file."""
    from diffusers import AutoencoderKL

    with pytest.raises(FileNotFoundError, match="vae = ann/none: no such folder here, and the hub has no such model"):
        load_vae("ann/none", torch.device("cpu"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    attempts: list[float] = []
    monkeypatch.setattr(time, "sleep", attempts.append)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ConnectionError, match=rf"^vae = ann/vae: the hub at {nowhere} cannot be reached") as error:
        load_vae("ann/vae", torch.device("cpu"))
    one_line(error)
    # A pipeline's, of which the cache has a copy, is read without the hub.
    cache = Path(constants.HF_HUB_CACHE) / "models--ann--pipeline"
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model.save_pretrained(cache / "snapshots" / ("0" * 40) / "vae")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    assert load_vae("ann/pipeline", torch.device("cpu")).latent_shape == (4, 1)
    assert not attempts


def test_of_a_model_that_is_not_there_no_other_file_is_asked_for(hub: Hub) -> None:
    assert cached_folder("ann/none", ("config.json", "tokenizer.json", "vocab.json")) is None
    asked = [request for request in hub.requests if "/ann/none/" in request]
    assert asked
    assert all(request.endswith("/config.json") for request in asked)
