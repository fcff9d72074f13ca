"""What a foreign model has that its class does not describe. Conversion would drop it in silence, so it is refused."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

_CALLS = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model inside a wrapper, or sharded, saying how to take it out.

    Raises:
        ValueError: it is wrapped.
    """
    name = type(model).__name__
    ancestors = {f"{ancestor.__module__.partition('.')[0]}.{ancestor.__name__}" for ancestor in type(model).__mro__}
    advice = None
    if any(ancestor.startswith("peft.") for ancestor in ancestors):
        advice = "model = model.merge_and_unload(), or model.unload() to leave its adapters out"
    elif "torch.OptimizedModule" in ancestors:
        advice = "convert model._orig_mod, and compile what convert returns"
    elif ancestors & {"torch.DistributedDataParallel", "torch.DataParallel"}:
        advice = "convert model.module, and wrap what convert returns"
    elif "torch.FullyShardedDataParallel" in ancestors:
        advice = "convert the model before it is sharded"
    elif "torch.FSDPModule" in ancestors or any(_is_sharded(tensor) for tensor in model.parameters()):
        advice = "convert the model before fully_shard is called on it, and shard the blocks"
    elif "torch.ScriptModule" in ancestors:
        advice = "convert the model that was scripted or traced"
    elif getattr(model, "_hf_peft_config_loaded", False):
        advice = "its adapters are in its layers: merge them into the weights (peft's merge_and_unload), or delete them"
    elif getattr(model, "hf_quantizer", None) is not None:
        advice = "its weights are quantised: load it without quantization_config, or model = model.dequantize()"
    if advice is not None:
        raise ValueError(f"cannot convert {name}: unwrap first: {advice}")


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor.data).__name__ == "DTensor"


def check_plain(model: nn.Module, reference: nn.Module, paths: Sequence[str]) -> None:
    """Refuse what conversion would drop, by name.

    That is: modules, parameters or buffers that the class does not have at that config; another class of module, or
    one with a method of its own; a method set on an instance; hooks on modules that the blocks do not hold, or on
    parameters; parameters that are one where the class has two; several devices; quantised weights.

    Args:
        model: an instance of a supported class, or of a subclass.
        reference: one of the supported class itself, with the same config, on the meta device.
        paths: those of the modules that the blocks hold, with all that is in them.

    Raises:
        ValueError: it has such a thing; the message names it.
    """
    name = type(model).__name__
    plain_name = f"{type(reference).__name__} of its config"

    def refuse(what: str, fix: str) -> None:
        raise ValueError(f"cannot convert {name}: {what}, which conversion would drop; {fix}")

    parts, original = (
        dict(model.named_modules(remove_duplicate=False)),
        dict(reference.named_modules(remove_duplicate=False)),
    )
    for path, part in parts.items():
        if path not in original:
            refuse(
                f"{path} ({type(part).__name__}) is no module of a {plain_name}",
                "take it out, or put its work into a head of your own",
            )
        _check_class(path, part, type(original[path]), refuse)
        _check_instance(path, part, type(original[path]), refuse)
    if missing := sorted(original.keys() - parts.keys()):
        raise ValueError(
            f"cannot convert {name}: it lacks {', '.join(missing[:3])}, which a {plain_name} has; let the config say "
            "how the model is"
        )
    _check_tensors(name, model, reference, plain_name, refuse)
    prefixes = tuple(f"{path}." for path in paths)
    for path, part in parts.items():
        in_blocks = path in paths or path.startswith(prefixes)
        if not in_blocks and any(len(getattr(part, hooks)) > len(getattr(original[path], hooks)) for hooks in _HOOKS):
            refuse(
                f"{path or 'the model'} has hooks", "remove them, and register them on a block of the converted model"
            )


def _check_class(path: str, part: nn.Module, original: type, refuse: Callable[[str, str], None]) -> None:
    """A module's class must be the library's, or a subclass that computes nothing of its own."""
    own_class = type(part)
    if own_class is original:
        return
    where = path or "the model"
    if not issubclass(own_class, original):
        refuse(
            f"{where} is a {own_class.__name__} in place of a {original.__name__}",
            "convert the model without it, or see docs/extending.md, 'A family'",
        )
    methods = _CALLS | {name for name, value in vars(original).items() if _computes(name, value)}
    for ancestor in own_class.__mro__[: own_class.__mro__.index(original)]:
        own = sorted(methods & vars(ancestor).keys())
        if own:
            refuse(
                f"{where} is a {own_class.__name__}, whose {own[0]} is its own (not {original.__name__}'s)",
                f"convert a {original.__name__}",
            )


def _computes(name: str, value: Any) -> bool:
    return isinstance(value, (types.FunctionType, property, staticmethod, classmethod)) and not name.startswith("__")


def _check_instance(path: str, part: nn.Module, original: type, refuse: Callable[[str, str], None]) -> None:
    """No method of the class may be hidden by an attribute of the instance."""
    where = path or "the model"
    if getattr(part, "_hf_hook", None) is not None:
        refuse(
            f"{where} has a hook of accelerate (device_map)",
            "load the model without device_map, or accelerate.hooks.remove_hook_from_module(model, recurse=True)",
        )
    if getattr(part, "_compiled_call_impl", None) is not None:
        refuse(f"{where} was compiled in place", "convert first, then compile what convert returns")
    for name in vars(part):
        if name in _CALLS or isinstance(getattr(original, name, None), types.FunctionType):
            refuse(f"{where} has a {name} set on the instance", "convert the model as its class is")


def _check_tensors(
    name: str, model: nn.Module, reference: nn.Module, plain_name: str, refuse: Callable[[str, str], None]
) -> None:
    tensors, original = dict(_tensors(model)), dict(_tensors(reference))
    for path, tensor in tensors.items():
        if path not in original:
            refuse(f"{path} is no parameter or buffer of a {plain_name}", "take it out")
        if tensor.shape != original[path].shape:
            raise ValueError(
                f"cannot convert {name}: {path} is {tuple(tensor.shape)}, in a {plain_name} it is "
                f"{tuple(original[path].shape)}; let the config say how the model is"
            )
        if original[path].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(
                f"cannot convert {name}: {path} is {tensor.dtype}: its weights are quantised; load it without "
                "quantization_config"
            )
        if tensor.requires_grad and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):  # type: ignore[attr-defined]
            refuse(
                f"{path} has a hook on its gradient", "remove it, and register it on the converted model's parameter"
            )
    if missing := sorted(original.keys() - tensors.keys()):
        raise ValueError(f"cannot convert {name}: it lacks {', '.join(missing[:3])}, which a {plain_name} has")
    first: dict[int, str] = {}
    for path, tensor in tensors.items():
        twin = first.setdefault(id(tensor), path)
        if original[twin] is not original[path]:
            refuse(f"{path} and {twin} are one tensor", "let each have its own: blocks train apart")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise ValueError(f"cannot convert {name}: it is on several devices, {', '.join(devices)}; move it to one first")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
