"""Damage to files and folders: what disks, copies, editors and mistakes do to them, as JSON values to be repeated.

A strategy draws operations from what is really in a folder, so that a new file or a new entry of an index is damaged
without a change here. `apply` carries one out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from odd import CONTAINERS, CONTENTS, FILE_NAMES, NAMES, SCALARS

Operation = dict[str, Any]
Strategy = st.SearchStrategy[Operation]

# ---- values of any type --------------------------------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(CONTAINERS),
    st.integers(-4, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 9), st.booleans(), st.floats(-2, 2)), max_size=5),
    st.builds(lambda v, n: [v] * n, st.sampled_from([0, 1, "x", None]), st.sampled_from([100, 5000])),
)


def few(one: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Lists of one to three, mostly of one: with several, each hides what the others do."""
    return st.one_of(*[st.lists(one, min_size=1, max_size=1)] * 3, st.lists(one, min_size=2, max_size=3))


#: changes of a value that is there
NEAR: dict[str, Callable[[Any], Any]] = {
    "plus one": lambda v: v + 1 if isinstance(v, int | float) else [v],
    "minus one": lambda v: v - 1 if isinstance(v, int | float) else {"x": v},
    "twice": lambda v: v * 2 if isinstance(v, int | float | str | list) else v,
    "negative": lambda v: -v if isinstance(v, int | float) else not v,
    "a little more": lambda v: v * 1.0001 if isinstance(v, int | float) else None,
    "as text": str,
    "in a list": lambda v: [v],
    "as float": lambda v: float(v) if isinstance(v, int) and abs(v) < 2**60 else 0.1,
    "reversed": lambda v: v[::-1] if isinstance(v, str | list) else v,
    "shorter": lambda v: v[:-1] if isinstance(v, str | list) else 0,
    "another letter": lambda v: ("b" if v[:1] == "a" else "a") + v[1:] if isinstance(v, str) else v,
}

# ---- JSON ----------------------------------------------------------------------------------------------------

Place = list[str | int]


def places(values: Any, under: Place | None = None) -> Iterator[Place]:
    """The path of every value in JSON values, the outermost first."""
    under = under or []
    yield under
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for count, (name, value) in enumerate(inner):
        if not isinstance(values, list) or count in (0, 1, len(values) - 1):  # of a long list the ends
            yield from places(value, [*under, name])


def changes(values: Any, *, inside: bool = False) -> Strategy:
    """Strategy of changes of JSON values; `inside` leaves the whole as the mapping it is."""
    known = [place for place in places(values) if place or not inside]
    named = [place for place in known if place]
    fields: list[Strategy] = [
        st.fixed_dictionaries({"change": st.just("set"), "place": st.sampled_from(known), "value": VALUES}),
        st.fixed_dictionaries(
            {
                "change": st.just("add"),
                "place": st.sampled_from(known),
                "name": st.sampled_from(NAMES),
                "value": VALUES,
            }
        ),
    ]
    if named:
        near = {"change": st.just("near"), "place": st.sampled_from(named), "how": st.sampled_from(sorted(NEAR))}
        fields += [
            st.fixed_dictionaries(near),
            st.fixed_dictionaries(near),
            st.fixed_dictionaries({"change": st.just("remove"), "place": st.sampled_from(named)}),
            st.fixed_dictionaries(
                {"change": st.just("move"), "place": st.sampled_from(named), "to": st.sampled_from(named)}
            ),
        ]
    return st.one_of(fields)


def changed_values(values: Any, change: Operation) -> Any:
    """JSON values after a change. What cannot be changed any more, because another change took it away, stays."""
    values = json.loads(json.dumps(values))
    try:
        return _changed(values, change)
    except (KeyError, IndexError, TypeError):
        return values


def _changed(values: Any, change: Operation) -> Any:
    box = [values]
    place, inner = [0, *change["place"]], box
    for step in place[:-1]:
        inner = inner[step]
    last: Any = place[-1]
    if change["change"] == "set":
        inner[last] = change["value"]
    elif change["change"] == "near":
        inner[last] = NEAR[change["how"]](inner[last])
    elif change["change"] == "remove":
        del inner[last]
    elif change["change"] == "add":
        inner[last][change["name"]] = change["value"]
    else:  # exchange two values
        to, other = [0, *change["to"]], box
        for step in to[:-1]:
            other = other[step]
        inner[last], other[to[-1]] = other[to[-1]], inner[last]
    return box[0]


# ---- files ---------------------------------------------------------------------------------------------------

_DTYPES = ["float16", "bfloat16", "float64", "int32", "int64", "bool", "uint8", "float32"]
_FILLS = ["nan", "one nan", "inf", "zeros", "one bit", "a little more", "noise", "huge"]
_SHAPES = ["flat", "transposed", "one more", "fewer rows", "no rows"]


def files_of(folder: Path) -> list[str]:
    """Names of the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def folder_damage(folder: Path, strangers: list[str]) -> st.SearchStrategy[list[Operation]]:
    """Strategy of one to three operations on a folder.

    Args:
        folder: as it is when sound.
        strangers: folders of another sound model of the same structure, below the root that `apply` is given.
    """
    names = files_of(folder)
    folders = sorted({str(Path(name).parent) for name in names if Path(name).parent != Path()})
    anything = st.sampled_from([*names, *folders])
    file = st.sampled_from(names)
    many = st.one_of(st.integers(0, 400), st.integers(0, 2**20))
    kinds: list[Strategy] = [
        st.fixed_dictionaries({"do": st.just("flip"), "file": file, "at": many, "bit": st.integers(0, 7)}),
        st.fixed_dictionaries({"do": st.just("flip"), "file": file, "at": many, "bit": st.integers(0, 7)}),
        st.fixed_dictionaries({"do": st.just("cut"), "file": file, "at": many}),
        st.fixed_dictionaries({"do": st.just("lengthen"), "file": file, "by": st.sampled_from([1, 8, 4096])}),
        st.fixed_dictionaries({"do": st.just("content"), "file": file, "what": st.sampled_from(sorted(CONTENTS))}),
        st.fixed_dictionaries(
            {"do": st.just("zeros"), "file": file, "at": many, "count": st.sampled_from([1, 64, 4096])}
        ),
        st.fixed_dictionaries({"do": st.just("remove"), "file": anything}),
        st.fixed_dictionaries(
            {"do": st.just("put"), "file": anything, "what": st.sampled_from(["folder", "pipe", "full folder"])}
        ),
        st.fixed_dictionaries({"do": st.just("link"), "file": anything, "to": st.sampled_from(_LINKS)}),
        st.fixed_dictionaries({"do": st.just("rename"), "file": anything, "to": st.sampled_from(FILE_NAMES)}),
        st.fixed_dictionaries(
            {"do": st.just("add"), "where": st.sampled_from(["", *folders]), "name": st.sampled_from(FILE_NAMES)}
        ),
        st.fixed_dictionaries({"do": st.just("swap"), "file": anything, "with": anything}),
        st.fixed_dictionaries({"do": st.just("copy"), "file": anything, "from": anything}),
    ]
    if strangers:
        kinds += [
            st.fixed_dictionaries({"do": st.just("stranger"), "file": file, "from": st.sampled_from(strangers)})
        ] * 2
    for name in names:
        if name.endswith(".json"):
            values = json.loads((folder / name).read_text())
            kinds += [_in_file("json", name, changes(values))] * 4
        elif name.endswith(".safetensors"):
            header = read_header(folder / name)
            kinds += [_in_file("header", name, changes(header))]
            tensors = sorted(set(header) - {"__metadata__"})
            if tensors:
                kinds += [_tensor_damage(name, tensors)] * 2
    return few(st.one_of(kinds))


_LINKS = ["nowhere", "itself", "another file", "the folder above", "/dev/zero", "/dev/null", "/etc/hostname"]


def _in_file(do: str, name: str, change: Strategy) -> Strategy:
    return st.fixed_dictionaries({"do": st.just(do), "file": st.just(name), "change": change})


def _tensor_damage(name: str, tensors: list[str]) -> Strategy:
    tensor = st.sampled_from(tensors)
    common = {"do": st.just("tensor"), "file": st.just(name), "tensor": tensor}
    how: list[Strategy] = [
        st.fixed_dictionaries(common | {"how": st.just("dtype"), "to": st.sampled_from(_DTYPES)}),
        st.fixed_dictionaries(common | {"how": st.just("fill"), "to": st.sampled_from(_FILLS)}),
        st.fixed_dictionaries(common | {"how": st.just("shape"), "to": st.sampled_from(_SHAPES)}),
        st.fixed_dictionaries(common | {"how": st.just("remove")}),
        st.fixed_dictionaries(common | {"how": st.just("rename"), "to": st.sampled_from(["x", "network.x", ""])}),
        st.fixed_dictionaries(common | {"how": st.just("exchange"), "to": tensor}),
        st.fixed_dictionaries(common | {"how": st.just("add"), "to": st.sampled_from(["x", "network.x", ""])}),
        st.fixed_dictionaries({**common, "tensor": st.just(""), "how": st.just("all"), "to": st.sampled_from(_DTYPES)}),
    ]
    return st.one_of(how)


def apply(operation: Operation, folder: Path, root: Path) -> None:
    """Damage a folder. What is not there any more, because another operation took it, is left alone.

    Args:
        operation: one that `folder_damage` drew.
        folder: what is damaged.
        root: of the sound inputs.
    """
    values = dict(operation)
    # With several operations one may have taken away what the next names.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, shutil.Error):
        _OPERATIONS[values.pop("do")](folder, root, **values)


def _flip(folder: Path, root: Path, file: str, at: int, bit: int) -> None:
    content = bytearray((folder / file).read_bytes())
    if content:
        content[at % len(content)] ^= 1 << bit
        (folder / file).write_bytes(content)


def _cut(folder: Path, root: Path, file: str, at: int) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: at % max(len(content), 1)])


def _lengthen(folder: Path, root: Path, file: str, by: int) -> None:
    with (folder / file).open("ab") as opened:
        opened.write(bytes(by))


def _content(folder: Path, root: Path, file: str, what: str) -> None:
    (folder / file).write_bytes(CONTENTS[what])


def _zeros(folder: Path, root: Path, file: str, at: int, count: int) -> None:
    content = bytearray((folder / file).read_bytes())
    start = at % max(len(content), 1)
    content[start : start + count] = bytes(len(content[start : start + count]))
    (folder / file).write_bytes(content)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove(folder: Path, root: Path, file: str) -> None:
    remove(folder / file)


def _put(folder: Path, root: Path, file: str, what: str) -> None:
    remove(folder / file)
    if what == "pipe":
        os.mkfifo(folder / file)
    else:
        (folder / file).mkdir()
        if what == "full folder":
            (folder / file / "x").write_text("x")


def _link(folder: Path, root: Path, file: str, to: str) -> None:
    path = folder / file
    others = [other for other in sorted(folder.rglob("*")) if other.is_file() and other != path]
    remove(path)
    targets = {"nowhere": "nowhere", "itself": path.name, "the folder above": ".."}
    path.symlink_to(str(others[-1]) if to == "another file" else targets.get(to, to))


def _rename(folder: Path, root: Path, file: str, to: str) -> None:
    (folder / file).rename((folder / file).with_name(to))


def _add(folder: Path, root: Path, where: str, name: str) -> None:
    path = folder / where / name
    if path.exists():
        return
    if name.startswith(("iteration", ".iteration", "model", ".model-old")) and "." not in name[1:]:
        path.mkdir()
        path = path / "x"
    path.write_bytes(b"x")


def _swap(folder: Path, root: Path, file: str, **other: str) -> None:
    temporary = folder / "swapped"
    (folder / file).rename(temporary)
    (folder / other["with"]).rename(folder / file)
    temporary.rename(folder / other["with"])


def _copy(folder: Path, root: Path, file: str, **other: str) -> None:
    if file == other["from"] or Path(file) in Path(other["from"]).parents or Path(other["from"]) in Path(file).parents:
        return
    temporary = folder / "copied"
    source = folder / other["from"]
    shutil.copytree(source, temporary) if source.is_dir() else shutil.copyfile(source, temporary)
    remove(folder / file)
    temporary.rename(folder / file)


def _stranger(folder: Path, root: Path, file: str, **other: str) -> None:
    shutil.copyfile(root / other["from"] / file, folder / file)


def _json(folder: Path, root: Path, file: str, change: Operation) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(changed_values(values, change)))


# ---- safetensors ---------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])  # type: ignore[no-any-return]


def _header(folder: Path, root: Path, file: str, change: Operation) -> None:
    content = (folder / file).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(changed_values(json.loads(content[8 : 8 + size]), change)).encode()
    (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _tensor(folder: Path, root: Path, file: str, tensor: str, how: str, to: str = "") -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        tensors = load_file(folder / file)
    except SafetensorError:
        return
    if how == "all":
        tensors = {n: t.to(getattr(torch, to)) if t.is_floating_point() else t for n, t in tensors.items()}
    elif tensor not in tensors:
        return
    elif how == "dtype":
        tensors[tensor] = tensors[tensor].to(getattr(torch, to))
    elif how == "fill":
        tensors[tensor] = _filled(tensors[tensor], to)
    elif how == "shape":
        tensors[tensor] = _reshaped(tensors[tensor], to)
    elif how == "remove":
        del tensors[tensor]
    elif how == "rename":
        tensors[to] = tensors.pop(tensor)
    elif how == "add":
        tensors[to] = tensors[tensor].clone()
    elif to in tensors:
        tensors[tensor], tensors[to] = tensors[to], tensors[tensor]
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / file)


def _filled(tensor: Any, how: str) -> Any:
    import torch

    tensor = tensor.clone()
    if how in ("one bit", "zeros") or not tensor.is_floating_point():
        content = tensor.contiguous().reshape(-1).view(torch.uint8)
        if how == "zeros":
            content.zero_()
        elif len(content):
            content[len(content) // 2] ^= 1
        return tensor
    flat = tensor.reshape(-1)
    if how == "one nan":
        flat[:1] = float("nan")
        return flat.reshape(tensor.shape)
    if how == "a little more":
        return tensor * 1.01 + 0.001
    if how == "noise":
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    return torch.full_like(tensor, {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}[how])


def _reshaped(tensor: Any, how: str) -> Any:
    if how == "flat":
        return tensor.reshape(-1)
    if how == "transposed":
        return tensor.movedim(0, -1) if tensor.dim() else tensor
    if how == "one more":
        return tensor[None]
    return tensor[: len(tensor) // 2 if how == "fewer rows" else 0] if tensor.dim() else tensor[None]


_OPERATIONS: dict[str, Callable[..., None]] = {
    "flip": _flip, "cut": _cut, "lengthen": _lengthen, "content": _content, "zeros": _zeros, "remove": _remove,
    "put": _put, "link": _link, "rename": _rename, "add": _add, "swap": _swap, "copy": _copy, "stranger": _stranger,
    "json": _json, "header": _header, "tensor": _tensor,
}  # fmt: skip
