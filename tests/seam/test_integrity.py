"""A saved model is what its index says, or is refused by name; what no reader would take is not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert, edit_index, fresh_causal, listing, randomise_adaptive, same_states, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.end_to_end import load_end_to_end, save_end_to_end
from diffusionblocks.core.saved_model import INDEX

BLOCK = "block-01.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors under the same metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: t.clone() for name, t in change(load_file(path)).items()}, path, metadata)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def first(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("fc1.weight"))


# ---- our format -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_unless_nothing_is_verified(folder: Path) -> None:
    flip(folder / BLOCK)
    with pytest.raises(ValueError, match=rf"{BLOCK} does not match .*SHA-256: it was changed or damaged"):
        db.load(folder)
    db.load(folder, verify=False)


def test_a_block_of_another_seed_or_model_is_refused(folder: Path, tmp_path: Path) -> None:
    convert(seed=1).save_pretrained(tmp_path / "seed")
    convert(seed=1, overlap=0.2).save_pretrained(tmp_path / "other")
    for name, message in (("seed", "another run of the same recipe"), ("other", "another model, block or training")):
        shutil.copyfile(tmp_path / name / BLOCK, folder / BLOCK)
        with pytest.raises(ValueError, match=rf"{BLOCK} does not match .*{message}"):
            db.load(folder)


def test_an_edited_index_is_refused_unless_its_digest_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = db.convert(tiny("vit", num_labels=12), db.BlocksConfig())  # names of ids, as text, sort otherwise than ids
    model.save_pretrained(folder)
    db.load(folder)
    file = folder / INDEX
    file.write_text(file.read_text().replace('"LABEL_11": 11', '"LABEL_11": 0'))
    for read in (db.load, lambda path: db.merge(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"{INDEX} was changed or damaged .* delete its entry sha256"):
            read(folder)
    edit_index(folder, lambda values: None)
    assert db.load(folder).config.label2id["LABEL_11"] == 0


@pytest.mark.parametrize("with_digests", [True, False])
def test_one_block_of_another_precision_is_refused(with_digests: bool, folder: Path) -> None:
    rewritten(folder / BLOCK, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    if not with_digests:
        edit_index(folder, lambda values: values.pop("files"))
    with pytest.raises(ValueError, match=rf"float32 weights and .*{BLOCK} bfloat16"):
        db.load(folder)


def test_an_index_of_an_earlier_version_is_read(folder: Path) -> None:
    whole = db.load(folder).state_dict()
    for name in folder.glob("*.safetensors"):
        save_file(load_file(name), name)  # without metadata
    edit_index(folder, lambda values: values.pop("files"))
    assert same_states(db.load(folder).state_dict(), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(files=3), r"files: .*\(got 3\)"),
        (lambda v: v.update(files={"../x.safetensors": v["files"][BLOCK]}), r"files"),
        (lambda v: v["files"][BLOCK].update(sha256="../../etc/passwd"), r"files.block-01.safetensors.sha256"),
        (lambda v: v["files"][BLOCK].update(bytes="many"), r"files.block-01.safetensors.bytes"),
        (lambda v: v["files"].pop(BLOCK), rf"files does not list {BLOCK}"),
        (lambda v: v.update(model_class=3), "model_class"),
        (lambda v: v.update(blocks_config=[]), "blocks_config"),
        (lambda v: v["partition"].update(layers=[1, 1, "1"]), "partition.layers.2"),
        (lambda v: v["partition"].update(layers=[1, 1, True]), "partition.layers.2"),
        (lambda v: v["partition"].update(layers=[1, 1, 7]), "partition has 9 layers"),
        (lambda v: v["partition"].update(boundaries=[0.1, "high", 1.0, 2.0]), "partition.boundaries.1"),
        (lambda v: v["model_config"].update(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
        (lambda v: v["model_config"].update(hidden_size=-1), "does not describe a model|does not match"),
        (lambda v: v.update(trained="yes"), "trained"),
    ],
)
def test_an_index_is_checked_field_by_field_in_one_line(
    change: Callable[[dict], Any], message: str, folder: Path
) -> None:
    edit_index(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        db.load(folder)
    assert "\n" not in str(error.value)
    assert INDEX in str(error.value)


def test_parts_of_different_trainings_are_not_merged(tmp_path: Path) -> None:
    from diffusionblocks.core.saving import save

    model = convert()
    for b, seed in enumerate((0, 0, 9)):
        save(model, tmp_path / str(b), [b], trained={"train": {"seed": seed}})
    with pytest.raises(ValueError, match=r"trained.train.seed is 0 in the first and 9 in the second"):
        db.merge([tmp_path / str(b) for b in range(3)], tmp_path / "out")
    save(model, tmp_path / "2", [2], trained={"train": {"seed": 0}})
    db.merge([tmp_path / str(b) for b in range(3)], tmp_path / "out")
    assert same_states(db.load(tmp_path / "out").state_dict(), model.state_dict())


def test_a_changed_part_is_not_merged(tmp_path: Path) -> None:
    model = convert()
    for b in range(3):
        model.save_pretrained(tmp_path / str(b), blocks=[b])
    flip(tmp_path / "1" / BLOCK)
    with pytest.raises(ValueError, match=rf"{BLOCK} does not match .*SHA-256"):
        db.merge([tmp_path / str(b) for b in range(3)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is not written ----------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A layer as PEFT wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)


class Marked(Tensor):
    """A subclass, as quantised and sharded tensors are."""


def _eight_bit(parent: nn.Module, name: str) -> None:
    weight = getattr(parent, name).weight
    getattr(parent, name).weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parent, name: setattr(parent, name, LowRank(getattr(parent, name))), "block 1 .*low-rank.*PEFT"),
        (lambda parent, name: setattr(parent, name, nn.Linear(3, 3)), r"block 1 .*\(3, 3\), the config says"),
        (lambda parent, name: getattr(parent, name).bfloat16(), "a model has one precision"),
        (_eight_bit, "int8"),
        (
            lambda parent, name: setattr(
                getattr(parent, name), "weight", nn.Parameter(torch.zeros(64, 32).as_subclass(Marked))
            ),
            "Marked.*ordinary tensor",
        ),
    ],
)
def test_what_no_reader_would_take_is_not_written(
    change: Callable[[nn.Module, str], None], message: str, tmp_path: Path
) -> None:
    model = convert()
    name = next(n for n, m in model.block(1).named_modules() if n.endswith("fc1"))
    parent, _, last = name.rpartition(".")
    change(model.block(1).get_submodule(parent), last)
    with pytest.raises(ValueError, match=message) as error:
        model.save_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_in_another_order_in_memory_are_saved(tmp_path: Path) -> None:
    model = convert()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    randomise_adaptive(model)
    model.save_pretrained(tmp_path / "m")
    assert same_states(db.load(tmp_path / "m").state_dict(), model.state_dict())


# ---- end to end -------------------------------------------------------------------------------------------------


def control(name: str) -> nn.Module:
    return fresh_causal("llama", tie_word_embeddings=True) if name == "llama" else tiny("vit")


CLASSES = {"vit": "ViTForImageClassification", "llama": "LlamaForCausalLM"}


@pytest.mark.parametrize("name", CLASSES)
def test_a_control_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = control(name)
    save_end_to_end(model, tmp_path / "m")
    assert same_states(load_end_to_end(CLASSES[name], tmp_path / "m").state_dict(), model.state_dict())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o666 & ~_umask(tmp_path)}


def _umask(folder: Path) -> int:
    (folder / "probe").touch()
    return 0o666 & ~(folder / "probe").stat().st_mode


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if name not in n}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("classifier.weight"), r"lacks tensors \['classifier.weight'\]"),
        (without("layernorm.bias"), "lacks tensors"),
        (lambda tensors: tensors | {"extra": torch.zeros(1)}, r"unknown tensors \['extra'\]"),
        (lambda tensors: tensors | {"classifier.weight": torch.zeros(7, 32)}, "classifier.weight|size"),
    ],
)
def test_a_control_is_not_filled_with_random_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    save_end_to_end(control("vit"), tmp_path / "m")
    (tmp_path / "m" / "files.json").unlink()
    rewritten(tmp_path / "m" / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load_end_to_end(CLASSES["vit"], tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_changed_control_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_end_to_end(control("vit"), path)
    flip(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors does not match files.json"):
        load_end_to_end(CLASSES["vit"], path)
    (path / "model.safetensors").write_bytes(b"\x00\xff" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_end_to_end(CLASSES["vit"], path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in safetensors"):
        load_end_to_end(CLASSES["vit"], path)


def test_an_end_to_end_config_that_changed_is_refused(tmp_path: Path) -> None:
    """The weights fit as ever, and what they compute is another function."""
    path = tmp_path / "m"
    save_end_to_end(control("vit"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"config.json does not match files.json"):
        load_end_to_end(CLASSES["vit"], path)
    assert load_end_to_end(CLASSES["vit"], path, verify=False).config.layer_norm_eps == 0.1


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    save_end_to_end(control("vit"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../model.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map.classifier.weight"):
        load_end_to_end(CLASSES["vit"], tmp_path / "m")


def test_an_adapter_beside_a_control_is_refused(tmp_path: Path) -> None:
    save_end_to_end(control("vit"), tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter"):
        load_end_to_end(CLASSES["vit"], tmp_path / "m")
    before = listing(tmp_path / "m")
    model = control("vit")
    model.vit.add_module("lora_A", nn.Linear(2, 2))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="low-rank"):
        save_end_to_end(model, tmp_path / "m")
    assert listing(tmp_path / "m") == before
