"""Watches one forward pass and replaces every call on a trainable parameter by its rule.

Inside ``with tracker:`` each torch function call is seen with its arguments. Tensors are of three kinds: those that come
from the *batch*, those *derived* from trainable parameters alone (``weight.t()``, a normalised weight, LoRA's product; the
parameters themselves too), and constants. Functions of one kind run as they are. Where a derived tensor meets the batch, the
call is run through an autograd function whose backward computes the input gradient only and hands (rule, x, g) to the
collector; autograd itself never forms a weight gradient. Per-sample gradients of derived tensors are pulled back to their
parameters later. What no rule covers is tried by the general rule, and what that cannot cover is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from privimage_fast.dp.calls import (
    BORROWS_ONLY,
    BORROWS_VALUES_OF_FIRST,
    ELEMENTWISE,
    EXPANDS,
    REWRITES,
    batch_norm_training,
    elementwise_rows,
    expanded_source,
)  # fmt: skip
from privimage_fast.dp.parsers import RULES
from privimage_fast.dp.row_selection import puts_back, reads_values, selects_rows
from privimage_fast.dp.rules import ExpandRule, GeneralRule, Rule, UncoveredParameterError, like
from privimage_fast.dp.uses import RuleCall, Sink


class Tracker(TorchFunctionMode):
    """Context in which a module's forward pass runs.

    Args:
        module: its trainable parameters are tracked, its buffers watched.
        inputs: the tensors that carry the batch (directly or nested in tuples, lists and dicts), rows first.
        sink: receives each :class:`Use` during the backward pass, last call first; shared by the forward passes of one step.
    """

    def __init__(self, module: nn.Module, inputs: Any, sink: Sink) -> None:
        super().__init__()
        self.parameters = trainable_parameters(module)
        if odd := [name for name, p in self.parameters.items() if p.is_complex()]:
            raise UncoveredParameterError(f"parameter {odd[0]!r} is complex, which no rule covers; keep it as two real ones")
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._buffers = {id(b): name for name, b in module.named_buffers()}
        self._versions = {name: b._version for name, b in module.named_buffers()}
        self._kept = {name: (b, b.data_ptr()) for name, b in module.named_buffers()}
        self._used: dict[str, int] = {}  # parameter → its version when it was first used
        self._module = module
        self._sink = sink
        self._batch = WeakIdKeyDictionary()
        self._derived = WeakIdKeyDictionary()  # tensor → True
        self._selected = WeakIdKeyDictionary()  # tensor whose rows the batch's values chose → True
        self._keys = WeakIdKeyDictionary()  # derived tensor that met the batch → its key
        # On the module's device: a copy to a GPU in every call would wait for it, and could not be captured.
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), requires_grad=True, device=device)
        with torch.enable_grad():
            self._anchor = self.anchor * 1  # not a leaf: the engine can be asked whether it will be reached
        self.calls = sink.calls
        self.derived: dict[str, Tensor] = {}
        self.without_grad: dict[str, str] = {}  # parameter → function that used it where gradients are off
        self._data_free: dict[str, int] = {}  # buffer → version up to which only parameters changed it
        self.recording = True  # False while checkpointed parts are computed again
        self.by_number = False  # something was taken for the batch's for having as many rows
        self.by_values = False  # values of the batch chose rows, or went to Python
        first = next((t for t in _tensors(inputs) if t.dim()), None)
        self.rows = 0 if first is None else first.shape[0]
        for tensor in _tensors(inputs):
            self._batch[tensor] = True

    # --- kinds of tensors

    def _is_derived(self, tensor: Tensor) -> bool:
        return id(tensor) in self._names or (bool(self._derived) and tensor in self._derived)

    def _from_batch(self, tensor: Tensor) -> bool:
        # What reaches the graph unseen (a custom autograd function) counts as the batch's.
        return tensor in self._batch or (tensor.requires_grad and not self._is_derived(tensor))

    def _mark_derived(self, out: Any) -> None:
        for t in _tensors(out):
            if t.requires_grad and id(t) not in self._names:
                self._derived[t] = True

    def _parameters_of(self, tensor: Tensor) -> list[str]:
        """Names of the parameters that a derived tensor is computed from."""
        if id(tensor) in self._names:
            return [self._names[id(tensor)]]
        found, seen, stack = [], set(), [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._names:
                found.append(self._names[id(variable)])
            stack.extend(f for f, _ in node.next_functions)
        return sorted(set(found))

    def _key(self, tensor: Tensor) -> str:
        """The name under which per-sample gradients of a parameter or derived tensor are collected; counts the call."""
        if id(tensor) in self._names:
            key = self._names[id(tensor)]
        else:
            key = self._keys.get(tensor)
            if key is None:
                # The numbers of a checkpointed part's second run are never collected, so they need not match.
                key = f"{len(self.derived)} derived from {', '.join(self._parameters_of(tensor))} at {id(self)}"
                self._keys[tensor] = key
                if self.recording:
                    self.derived[key] = tensor
                    # Counted as called often, so that both are stored: the pull-back reads the one and adds to the others.
                    self.calls.update(dict.fromkeys((key, *self._parameters_of(tensor)), 2))
        if self.recording:
            self.calls[key] += 1
            for name in self._parameters_of(tensor):
                self._used.setdefault(name, self.parameters[name]._version)
        return key

    # --- the mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        weights = [t for t in tensors if self._is_derived(t)]
        touched = [t for t in tensors if id(t) in self._buffers]
        versions = [t._version for t in touched]
        if func in (F.batch_norm, torch.batch_norm) and batch_norm_training(args, kwargs) and not self._is_derived(tensors[0]):
            self._refuse_batch_norm(weights)  # of a weight (weight standardisation) it mixes no samples
        if not weights:
            out = func(*args, **kwargs)
        elif not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if func.__name__ not in ("detach", "__get__") and any(t.is_floating_point() for t in _tensors(out)):
                for t in weights:
                    if id(t) in self._names:
                        self.without_grad.setdefault(self._names[id(t)], _function_name(func))
            if not any(self._from_batch(t) for t in tensors):
                self._mark_derived(out)  # some views require a gradient even here
        else:
            out = self._on_parameters(func, args, kwargs, tensors, weights)
        self._watch_buffers(tensors, touched, versions)
        values = tensors[:1] if func in BORROWS_VALUES_OF_FIRST else tensors
        self._watch_rows(func, args, kwargs, values, out)
        if any(self._from_batch(t) for t in values):
            # In-place calls change their first argument and may return nothing (``buffer[:, :n] = x``).
            for tensor in (*_tensors(out), *_tensors(args[:1] if out is None else ())):
                if not self._is_derived(tensor):
                    self._batch[tensor] = True
        return out

    def _on_parameters(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor],
        weights: list[Tensor],
    ) -> Any:  # fmt: skip
        rows_of_constants = func in RULES and self._constant_rows(func, args, kwargs)
        meets_batch = rows_of_constants or any(self._from_batch(t) for t in tensors)
        source = expanded_source(func, args, kwargs, self.rows) if func in EXPANDS and self.rows else None
        if source is not None and any(source[0] is w for w in weights):
            self.by_number = True
            return self._expand(*source)
        if meets_batch and self._selected and func not in BORROWS_ONLY and any(t in self._selected for t in tensors):
            self._refuse_selected(func, weights)
        if self.rows == 0:
            return func(*args, **kwargs)  # nothing to keep apart
        if not meets_batch or func in BORROWS_ONLY:
            out = func(*args, **kwargs)
            self._mark_derived(out)
            return out
        if func in RULES:
            out = self._by_rule(func, args, kwargs)
            if out is not None:
                return out
        if func in REWRITES:
            with self:
                return REWRITES[func](*args, **kwargs)
        if func in ELEMENTWISE:
            out = self._elementwise(func, args, kwargs, weights)
            if out is not None:
                return out
        return self._generally(func, args, kwargs, weights)

    def _constant_rows(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """An input made inside the loss (a GAN's noise) with one row for each row of the batch counts as the batch's.

        If it is not (class descriptions, as many as there are rows in a batch of this size), ``probe_rows`` finds out: it looks
        at every number of rows anew where such a tensor was met. A buffer is never the batch's.
        """
        x = kwargs.get("input", args[0] if args else None)
        found = (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.dim() > 1
            and x.shape[0] == self.rows
            and not self._is_derived(x)
            and id(x) not in self._buffers
        )
        self.by_number |= found and not self._from_batch(x)
        return found

    def _apply(self, rule: Rule, x: Tensor, *more: Tensor) -> Tensor:
        return RuleCall.apply(self._anchor.to(x.device), rule, self._sink, x, *more)

    def _expand(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A parameter repeated for each row, as a tensor of the batch whose rows carry their own gradient."""
        rule = ExpandRule("expand", {"weight": self._key(tensor)}, tensor.detach(), None, {"shape": shape[1:]})
        out = self._apply(rule, tensor.new_empty(shape[0], 0))
        self._batch[out] = True
        return out

    def _elementwise(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], weights: list[Tensor]
    ) -> Any | None:
        """Broadcasting a parameter against the batch is broadcasting its own copy for each row."""
        found = elementwise_rows(func, args, kwargs, lambda t: self._is_derived(t), self.rows)
        if found is None:
            return None
        copies: dict[int, Tensor] = {}
        for t in weights:
            shape = found(t)
            if shape is None:
                return None
            copies[id(t)] = self._expand(t, shape)
        return func(*_replaced(args, copies), **_replaced(kwargs, copies))

    def _by_rule(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The call through its rule; None where it has a form that the rule does not cover."""
        parse = RULES[func]
        call = inspect.signature(parse).bind({}, *args, **kwargs).arguments
        if self._is_derived(call["input"]):
            return None
        roles = {role: call.get(role) for role in ("weight", "bias") if isinstance(call.get(role), Tensor)}
        if any(self._from_batch(t) for t in roles.values()):
            return None
        trained = {role: t for role, t in roles.items() if self._is_derived(t)}
        if len({id(t) for t in trained.values()}) < len(trained):
            return None
        names = {role: self._key(t) for role, t in trained.items()}
        detached = {role: t.detach() for role, t in roles.items()}
        x, rule = parse(**{**call, **detached, "names": names})
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x, rule = _autocast(x, rule)
        return self._apply(rule, x, *rule.take_more())

    def _generally(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], weights: list[Tensor]) -> Any:
        """Any function that treats rows alike, one sample at a time in the backward pass."""
        out = func(*args, **kwargs)
        # Reading a shape or detaching is harmless; anything differentiable is a use to be clipped.
        if not any(t.requires_grad for t in _tensors(out) if not self._is_derived(t)):
            return out
        name = _function_name(func)
        unique = list({id(t): t for t in weights}.values())
        data = list({id(t): t for t in _tensors((args, kwargs)) if self._from_batch(t) and not self._is_derived(t)}.values())
        where = f"{name}({', '.join(sorted({n for t in unique for n in self._parameters_of(t)}))})"
        if not isinstance(out, Tensor) or any(out is a for a in _tensors((args, kwargs))):
            raise UncoveredParameterError(
                f"{where} returns {type(out).__name__} or works in place; the general rule needs one new tensor. Freeze the "
                "parameter with requires_grad_(False), or express it through other torch functions"
            )
        rule = GeneralRule.make(
            func, args, kwargs, weights=unique, names=[self._key(t) for t in unique], data=data, rows=self.rows, where=where
        )
        rule.check_rows(out.detach(), data)
        return self._apply(rule, *data)

    # --- refusals

    def _refuse_selected(self, func: Callable[..., Any], weights: list[Tensor]) -> None:
        names = sorted({n for t in weights for n in self._parameters_of(t)})
        raise UncoveredParameterError(
            f"{_function_name(func)}({', '.join(names)}) is applied to rows that were chosen by the batch's own values (a "
            "boolean mask, nonzero, a sort): which sample a row belongs to cannot be known. Apply the layer to all rows and mask "
            "what comes out, put the rows back first, or freeze the parameter with requires_grad_(False)"
        )

    def _refuse_batch_norm(self, weights: list[Tensor]) -> None:
        names = sorted({n for t in weights for n in self._parameters_of(t)})
        where = f" (parameter {names[-1]!r})" if names else ""
        raise UncoveredParameterError(
            f"batch normalisation{where} uses the statistics of the whole batch, so one sample's gradient depends on the "
            "others and cannot be clipped; use GroupNorm, or put the layer in eval() mode"
        )

    def _watch_rows(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Tensor], out: Any
    ) -> None:
        """Marks what has rows that the batch's values chose."""
        if reads_values(func):
            self.by_values |= any(self._from_batch(t) for t in values)
            return
        chosen = bool(values) and selects_rows(func, args, kwargs, self._from_batch)
        self.by_values |= chosen
        if not chosen and self._selected and any(t in self._selected for t in values):
            chosen = not puts_back(func, args, kwargs, lambda t: self._from_batch(t) or t in self._selected, self.rows)
        if chosen:
            into = out if out is not None else args[:1]  # ``buffer[:n] = x[mask]`` returns nothing
            self._selected.update({t: True for t in _tensors(into) if t.dim()})

    def _watch_buffers(self, tensors: list[Tensor], touched: list[Tensor], versions: list[int]) -> None:
        for t, before in zip(touched, versions, strict=True):
            name = self._buffers[id(t)]
            if t._version != before and not any(self._from_batch(o) for o in tensors if o is not t) and (
                self._data_free.get(name, self._versions[name]) == before
            ):  # fmt: skip
                self._data_free[name] = t._version

    def check_buffers(self) -> None:
        """Raises UncoveredParameterError where the forward pass kept statistics of the batch, which nobody would noise."""
        for name, buffer in self._module.named_buffers():
            if name.endswith("num_batches_tracked"):
                continue
            before, place = self._kept.get(name, (None, 0))
            if buffer is not before or buffer.data_ptr() != place:  # assigned anew rather than changed in place
                changed = buffer in self._batch
            else:
                changed = buffer._version != self._data_free.get(name, self._versions.get(name))
            if changed:
                raise UncoveredParameterError(
                    f"the forward pass changes the buffer {name!r}: statistics of the batch would be kept without noise; turn "
                    "running statistics off (track_running_stats=False), or put the layer in eval() mode"
                )

    def check_unchanged(self) -> None:
        """Raises RuntimeError for a parameter that was changed in place after its use: backward would see other weights."""
        for name, version in self._used.items():
            if self.parameters[name]._version != version:
                raise RuntimeError(
                    f"parameter {name!r} was modified by an inplace operation between its use in the loss and the backward pass"
                )

    def check_gradients(self, leaks: dict[str, Tensor | None]) -> None:
        """Raises UncoveredParameterError for a parameter whose gradient did not come by way of a rule.

        ``leaks``: what autograd itself found, by parameter; anything but None was summed over samples unseen.
        """
        for name, leak in leaks.items():
            if leak is not None:
                raise UncoveredParameterError(
                    f"parameter {name!r} reached the loss by a way the engine cannot see (a custom autograd function, or a "
                    "tensor that does not come from the batch), so its gradient is not per sample; freeze it with "
                    "requires_grad_(False), use it through torch functions, or pass every batch tensor through `args`"
                )
        for name, function in self.without_grad.items():
            if not self.calls[name]:
                raise UncoveredParameterError(
                    f"parameter {name!r} is used by {function} only where gradients are off (no_grad, or checkpointing with "
                    "use_reentrant=True): it would not train; freeze it, or use checkpointing with use_reentrant=False"
                )


def _autocast(x: Tensor, rule: Rule) -> tuple[Tensor, Rule]:
    """Casts as autocast would, but outside the call, so that x and g of a :class:`Use` have one dtype.

    Normalisation keeps fp32: its statistics do not survive bf16. Fused ones take x as it is, and compute in fp32.
    """
    if rule.function in ("fused_group_norm", "residual"):
        return x, rule
    low = rule.function not in ("group_norm", "layer_norm", "embedding")
    dtype = torch.get_autocast_dtype(x.device.type) if low else torch.float32
    # cuDNN would bring the weight into the order of images with channels innermost, in both passes: with the cast it is free.
    innermost = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if innermost and rule.function == "conv2d" else torch.preserve_format
    rule.weight = None if rule.weight is None else rule.weight.to(dtype, memory_format=layout)
    rule.bias = None if rule.bias is None else rule.bias.to(dtype)
    return x.to(dtype), rule


def _replaced(tree: Any, by_id: dict[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return by_id.get(id(tree), tree)
    if isinstance(tree, dict):
        return {key: _replaced(value, by_id) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return like(tree, (_replaced(value, by_id) for value in tree))
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _function_name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", repr(func))
    # Property getters arrive as their slot wrapper's __get__, whose own name says nothing.
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Qualified name → parameter for every parameter that requires a gradient; tied ones once, by their first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def batch_tensors(tree: Any) -> Iterable[Tensor]:
    """Every tensor of a nested structure of tuples, lists and dicts, in order."""
    return list(_tensors(tree))
