"""Merging: blocks saved apart make the very files of the whole model; whatever does not belong together is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIT_FAMILIES, FAMILIES, convert, edit_index, listing, noise_batch, same_states, seeded, tiny
from safetensors.torch import load_file, save_file

import diffusionblocks as db
from diffusionblocks.core.saved_model import INDEX


def made(family: str = "vit", *, seed: int = 0, **config: Any) -> db.DiffusionBlocks:
    """A model whose blocks have moved apart as training moves them: in their trainable parameters."""
    model = convert(family, seed=seed, **config)
    g = seeded(seed + 50)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model.eval()


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """One model in three folders, a block each; `tmp_path / "whole"` holds it whole."""
    model = made()
    model.save_pretrained(tmp_path / "whole")
    folders = [tmp_path / name for name in "abc"]
    for b, folder in enumerate(folders):
        model.save_pretrained(folder, blocks=[b])
    return folders


def refused(message: str, folders: list[Path], error: type[Exception] = ValueError, **options: Any) -> None:
    """Merging is refused with that message and writes nothing."""
    out = options.pop("out", folders[0].parent / "out")
    before = listing(out) if out.is_dir() else None
    with pytest.raises(error, match=message):
        db.merge(folders, out, **options)
    assert (listing(out) if out.is_dir() else None) == before
    assert not [f for f in out.parent.iterdir() if f.name.startswith(".")]


# ---- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("shared", ["replicated", "frozen"])
@pytest.mark.parametrize("family", [*FAMILIES, *DIT_FAMILIES])
def test_the_merged_model_is_the_whole_one(family: str, shared: str, tmp_path: Path) -> None:
    model = made(family, shared=shared)
    model.save_pretrained(tmp_path / "whole")
    for name, blocks in (("a", [1]), ("b", [0, 2])):
        model.save_pretrained(tmp_path / name, blocks=blocks)
    db.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    merged = db.load(tmp_path / "out")
    assert same_states(merged.state_dict(), model.state_dict())
    assert same_states(merged.export_initialisation().state_dict(), model.export_initialisation().state_dict())
    if family in DIT_FAMILIES:
        assert torch.equal(merged.sample([0, 1], steps=3), model.sample([0, 1], steps=3))
    else:
        images = noise_batch()["pixel_values"]
        ours, theirs = (m.predict(images, steps=3, seeds=1, generator=seeded()).logits for m in (merged, model))
        assert torch.equal(ours, theirs)


def test_the_order_of_the_folders_does_not_matter(parts: list[Path], tmp_path: Path) -> None:
    db.merge(parts[::-1], tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_it_says_where_each_block_came_from(parts: list[Path], tmp_path: Path) -> None:
    origins = db.merge([parts[2], parts[0], parts[1]], tmp_path / "out")
    assert [origin.block for origin in origins] == [0, 1, 2]
    assert [origin.folder for origin in origins] == parts
    assert [origin.layers for origin in origins] == [range(b, b + 1) for b in range(3)]
    assert [o.size for o in origins] == [(parts[b] / f"block-0{b}.safetensors").stat().st_size for b in range(3)]
    assert all(origin.passed_over == () for origin in origins)


@pytest.mark.parametrize("shared", ["replicated", "frozen", "joint"])
def test_a_whole_model_alone_is_copied(shared: str, tmp_path: Path) -> None:
    made(shared=shared).save_pretrained(tmp_path / "whole")
    db.merge([tmp_path / "whole"], tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    db.merge(tmp_path / "whole", tmp_path / "again")
    assert listing(tmp_path / "again") == listing(tmp_path / "whole")


def test_the_folder_of_a_run_stands_for_its_model(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    parts[1].rename(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    db.merge([parts[0], tmp_path / "run", parts[2]], tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_a_folder_that_does_not_list_its_blocks_holds_all(parts: list[Path], tmp_path: Path) -> None:
    edit_index(tmp_path / "whole", lambda values: values.pop("blocks"))
    db.merge([tmp_path / "whole"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["blocks"] == [0, 1, 2]
    refused("block 0 is in", [tmp_path / "whole", parts[0]])
    edit_index(parts[0], lambda values: values.pop("blocks"))
    refused(r"a.block-01\.safetensors is missing, though", parts, FileNotFoundError)


def test_what_else_is_in_the_output_folder_stays(parts: list[Path], tmp_path: Path) -> None:
    made(num_blocks=1, shared="joint", seed=9).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    db.merge(parts, tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "whole") | {"notes.txt": b"mine"}


@pytest.mark.slow
def test_a_failed_copy_leaves_the_older_model(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(seed=9).save_pretrained(tmp_path / "out")
    before = listing(tmp_path / "out")
    real, copied = shutil.copyfile, []

    def failing(source: Path, target: Path) -> None:
        if len(copied) == 2:
            raise OSError("no space left on device")
        copied.append(source)
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    with pytest.raises(OSError, match="no space"):
        db.merge(parts, tmp_path / "out")
    assert len(copied) == 2
    assert listing(tmp_path / "out") == before
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


# ---- whose block ------------------------------------------------------------------------------------------------


def test_missing_blocks_are_named(parts: list[Path]) -> None:
    refused(r"blocks \[1\] are in none of .*train\.blocks: \[1\]", [parts[0], parts[2]])
    refused(r"blocks \[0, 2\] are in none", [parts[1]])


def test_a_block_in_two_folders_needs_a_preference(parts: list[Path], tmp_path: Path) -> None:
    other = made(seed=1)
    other.save_pretrained(tmp_path / "other", blocks=[1, 2])
    folders = [*parts, tmp_path / "other"]
    refused(rf"block 1 is in {parts[1]} and in {tmp_path / 'other'}.*--prefer {parts[1]}", folders)
    refused(r"block 2 is in", folders, prefer=parts[1])  # which says nothing about block 2

    origins = db.merge(folders, tmp_path / "out", prefer=tmp_path / "other")
    assert [origin.folder for origin in origins] == [parts[0], tmp_path / "other", tmp_path / "other"]
    assert [origin.passed_over for origin in origins] == [(), (parts[1],), (parts[2],)]
    merged = db.load(tmp_path / "out")
    assert same_states(merged.block(0).state_dict(), db.load(tmp_path / "whole").block(0).state_dict())
    assert same_states(merged.block(1).state_dict(), other.block(1).state_dict())

    # Of several, the first that holds the block.
    origins = db.merge(folders, tmp_path / "out", prefer=[parts[1], str(tmp_path / "other")])
    assert [origin.folder for origin in origins] == [parts[0], parts[1], tmp_path / "other"]


def test_a_preference_is_one_of_the_folders(parts: list[Path], tmp_path: Path) -> None:
    refused("prefer = .*whole is none of the folders", parts, prefer=tmp_path / "whole")
    refused("nowhere holds no model", parts, FileNotFoundError, prefer=tmp_path / "nowhere")
    db.merge(parts, tmp_path / "out", prefer=tmp_path / "." / "a")  # another spelling of one of them, not needed


def test_a_preference_may_name_the_folder_of_a_run(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    parts[1].rename(tmp_path / "run" / "model")
    folders = [tmp_path / "whole", tmp_path / "run"]
    origins = db.merge(folders, tmp_path / "out", prefer=tmp_path / "run")
    assert [origin.folder.name for origin in origins] == ["whole", "model", "whole"]


# ---- parts of different models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"overlap": 0.2}, "blocks_config.overlap is 0.05 in the first and 0.2 in the second"),
        ({"seed": 3}, "blocks_config.seed is 0 in the first and 3 in the second"),
        ({"noise": db.EDM(p_mean=-0.5)}, "blocks_config.noise.p_mean is -1.2 in the first and -0.5 in the second"),
        ({"shared": "frozen"}, "blocks_config.shared is replicated in the first and frozen in the second"),
        ({"target": {"token": "replace-cls"}}, "blocks_config.target.token is extra in the first and replace-cls"),
    ],
)
def test_another_blocks_config_is_named(config: dict, message: str, parts: list[Path]) -> None:
    shutil.rmtree(parts[1])
    db.convert(tiny(), db.BlocksConfig(**config)).save_pretrained(parts[1], blocks=[1])
    refused(message, parts)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("vit", {"intermediate_size": 96}, "model_config.intermediate_size is 64 in the first and 96 in the second"),
        ("vit", {"num_labels": 5}, "model_config.id2label.4 is None in the first and LABEL_4 in the second"),
        ("vit", {"attn_implementation": "eager"}, "model_config.attn_implementation is sdpa in the first and eager"),
        ("deit", {}, "model_class is ViTForImageClassification in the first and DeiTForImageClassification"),
    ],
)
def test_another_original_is_named(family: str, overrides: dict, message: str, parts: list[Path]) -> None:
    shutil.rmtree(parts[1])
    db.convert(tiny(family, **overrides)).save_pretrained(parts[1], blocks=[1])
    refused(message, parts)
    refused(rf"{parts[0]} and {parts[1]} hold parts of different models", parts)


def test_who_wrote_a_folder_does_not_matter(parts: list[Path], tmp_path: Path) -> None:
    change = {"transformers_version": "5.0.0", "_name_or_path": "elsewhere", "architectures": ["ViT"]}
    edit_index(parts[1], lambda values: values["model_config"].update(change))
    db.merge(parts, tmp_path / "out")
    assert same_states(db.load(tmp_path / "out").state_dict(), db.load(tmp_path / "whole").state_dict())


def test_a_partition_that_does_not_follow_is_refused(parts: list[Path]) -> None:
    for folder in parts:
        edit_index(folder, lambda values: values["partition"]["boundaries"].__setitem__(1, 0.3))
    refused("partition does not follow from the blocks_config", parts)


# ---- shared parts -----------------------------------------------------------------------------------------------


def test_joint_parts_are_not_merged(tmp_path: Path) -> None:
    for name in "ab":
        made(shared="joint").save_pretrained(tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    refused("shared = joint.*replicated or frozen", folders)
    refused("shared = joint", folders, prefer=tmp_path / "a")


@pytest.mark.parametrize("family", ["vit", "dit", "diffusers-dit"])
def test_frozen_parts_must_be_the_same(family: str, tmp_path: Path) -> None:
    """Originals of another start: under `frozen` their stems differ, under `replicated` each block has its own."""
    for shared in ("replicated", "frozen"):
        folders = [tmp_path / shared / "a", tmp_path / shared / "b"]
        made(family, seed=0, shared=shared).save_pretrained(folders[0], blocks=[0, 1])
        made(family, seed=1, shared=shared).save_pretrained(folders[1], blocks=[2])
    stem = {"vit": "classifier", "dit": "final_layer", "diffusers-dit": "pos_embed|proj_out"}[family]
    refused(rf"network\.({stem})\S* differs between .*block-00.* and .*b.block-02.*shared = frozen", folders)
    db.merge([tmp_path / "replicated" / "a", tmp_path / "replicated" / "b"], tmp_path / "out")  # the positive control


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "diffusers-dit"])
def test_every_frozen_part_is_compared_and_nothing_else(family: str, tmp_path: Path) -> None:
    model = made(family, shared="frozen")
    for b in range(3):
        model.save_pretrained(tmp_path / str(b), blocks=[b])
    folders = [tmp_path / str(b) for b in range(3)]
    path = folders[1] / "block-01.safetensors"
    edit_index(folders[1], lambda values: values.pop("files"))  # which would tell of every change
    whole = load_file(path)
    frozen = {name for name, parameter in model.block(1).named_parameters() if not parameter.requires_grad}
    refusals = set()
    for name, tensor in whole.items():
        save_file(whole | {name: tensor + 1}, path)
        try:
            db.merge(folders, tmp_path / "out")
        except ValueError as error:
            assert f"{name} differs" in str(error)  # noqa: PT017 - some are refused, and which is what is tested
            refusals.add(name)
    assert refusals == frozen
    assert 5 < len(frozen) < len(whole) - 5


@pytest.mark.parametrize("shared", ["replicated", "frozen"])
@pytest.mark.parametrize("change", ["negated", "negative zero"])
def test_the_space_of_z_must_be_the_same(shared: str, change: str, tmp_path: Path) -> None:
    model = made(shared=shared)
    name = "shared.target.embedding"
    with torch.no_grad():
        for b in range(3):
            model.block(b).target.embedding[0, 0] = 0.0  # whose bits differ from those of -0.0
    for b in range(3):
        model.save_pretrained(tmp_path / str(b), blocks=[b])
    folders = [tmp_path / str(b) for b in range(3)]

    def alter(tensors: dict[str, torch.Tensor]) -> None:
        entries = slice(None) if change == "negated" else (0, 0)
        tensors[name][entries] = -tensors[name][entries]

    db.merge(folders, tmp_path / "before")  # the positive control
    rewrite(folders[2] / "block-02.safetensors", alter)
    message = "z must live in one space" if shared == "replicated" else "shared parameters are fixed"
    refused(rf"{name} differs between .*block-00.*block-02.*{message}", folders)


# ---- files ------------------------------------------------------------------------------------------------------


def test_a_listed_file_that_is_missing_is_named(parts: list[Path]) -> None:
    (parts[1] / "block-01.safetensors").unlink()
    refused(rf"{parts[1]}.block-01\.safetensors is missing, though .*{INDEX} lists block 1", parts, FileNotFoundError)


def test_the_missing_file_of_joint_parts_is_named(tmp_path: Path) -> None:
    made(shared="joint").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "shared.safetensors").unlink()
    refused(r"shared\.safetensors is missing", [tmp_path / "a"], FileNotFoundError)


@pytest.mark.parametrize("damage", ["cut", "empty", "rubbish"])
def test_a_damaged_file_is_named(damage: str, parts: list[Path]) -> None:
    path = parts[1] / "block-01.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "rubbish": b"\x00\xff" * 100}[damage])
    refused(rf"{path} is damaged or not safetensors", parts)


def test_tensors_that_do_not_match_are_named(parts: list[Path], tmp_path: Path) -> None:
    path = parts[1] / "block-01.safetensors"
    before, whole = path.read_bytes(), load_file(path)
    name = next(n for n in whole if n.endswith("fc1.weight"))
    cases = [
        (
            {n: t for n, t in whole.items() if n != name},
            rf"{path} does not match the model: it lacks tensors \['{name}'\]",
        ),
        (whole | {"extra": torch.zeros(1)}, rf"{path} .* it has unknown tensors \['extra'\]"),
        (
            whole | {name: torch.zeros(2, 2)},
            rf"{path} .* it has {name} as torch.float32 \(2, 2\), the config says floating",
        ),
        (whole | {name: whole[name].to(torch.int64)}, rf"{path} .* it has {name} as torch.int64"),
        (load_file(parts[0] / "block-00.safetensors"), rf"{path} .* it lacks tensors"),  # another block's file
        ({n: t.bfloat16() for n, t in whole.items()}, rf"holds float32 weights and {path} bfloat16"),
        (whole | {name: whole[name].bfloat16()}, r"holds float32 weights and .* bfloat16, float32"),
    ]
    for wrong, message in cases:
        save_file(wrong, path)
        refused(message, parts)
    path.write_bytes(before)
    db.merge(parts, tmp_path / "out")  # the positive control


def test_blocks_of_one_lower_precision_are_merged(tmp_path: Path) -> None:
    model = db.convert(tiny().bfloat16())
    for b in range(3):
        model.save_pretrained(tmp_path / str(b), blocks=[b])
    db.merge([tmp_path / str(b) for b in range(3)], tmp_path / "out")
    assert same_states(db.load(tmp_path / "out").state_dict(), model.state_dict())


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_named(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        refused(rf"{name} holds no model: there is no {INDEX}", [*parts, tmp_path / name], FileNotFoundError)


def test_a_damaged_index_is_named(parts: list[Path]) -> None:
    (parts[2] / INDEX).write_text("{")
    refused(rf"{parts[2] / INDEX} is not JSON", parts)


def test_a_folder_is_given_once(parts: list[Path], tmp_path: Path) -> None:
    refused("a is given twice", [*parts, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match="nothing to merge"):
        db.merge([], tmp_path / "out")


def test_the_inputs_are_not_replaced(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    run = tmp_path / "runs" / "one"
    parts[0].rename(run / "model")
    folders = [run, *parts[1:]]
    for out in (parts[1], run, run / "model", tmp_path / "runs", tmp_path / "b" / ".." / "c"):
        refused("which is merged; choose another folder", folders, out=out)
    (tmp_path / "file").write_text("")
    refused("file is a file; choose a folder", folders, out=tmp_path / "file")
    assert (tmp_path / "file").is_file()
    db.merge(folders, run / "merged")  # beside the run's model is no harm
    assert listing(run / "merged") == listing(tmp_path / "whole")


def test_a_folder_of_other_things_is_not_replaced(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    refused("holds other things", parts, out=tmp_path / "work")
    refused("symbolic link", parts, out=tmp_path / "link")
    (tmp_path / "file").write_text("mine")
    refused("is a file", parts, out=tmp_path / "file")
