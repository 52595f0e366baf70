"""The meter: multiply-adds of a model, dense and reduced side by side.

Counting follows fvcore (Facebook Research's `FlopCountAnalysis`): one multiply-add counts 1, a LayerNorm with weights 5
per element, softmax, activations, additions and indexing 0. fvcore reads a jit trace, so the count is of what the
forward executes, the matching and merging of an attached reducer included. What is added here: attention counts the
same on every kernel (eager, fused, `nn.MultiheadAttention`'s fast path), nothing that ran is pruned from the trace, and
every operator that counted nothing is listed in the report. docs/flops.md has the details and the limits.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from crossget.core.attachment import find_attachment

__all__ = ["Count", "FlopReport", "Inputs", "count_flops"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

_Handle = Callable[[list[Any], list[Any]], "int | Counter[str]"]


# ---------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class Count:
    """What one forward costs.

    Args:
        total: multiply-adds of the whole forward.
        by_module: multiply-adds by module name, "" being the whole; a module includes its children.
        by_operator: multiply-adds by operator.
        zero: operators that ran and count 0 by convention (elementwise, reductions, indexing), with their calls.
        unsupported: operators that ran and that nobody has a formula for: the total lacks them. Name -> calls.
        uncalled: modules with parameters in which nothing was called: unused, or read by their parent, which then
            holds the count.
    """

    total: int
    by_module: Mapping[str, int]
    by_operator: Mapping[str, int]
    zero: Mapping[str, int] = field(default_factory=dict)
    unsupported: Mapping[str, int] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlopReport:
    """The counts of a model: dense and, where a reducer is attached, reduced.

    `total`, `by_module`, `by_operator` and `unsupported` speak of the model as it was given: of `reduced` where there
    is one, of `dense` otherwise.

    Args:
        model: class of the model.
        inputs: shapes of the tensors that it was called with.
        dense: without any reducer.
        reduced: with the reducers; None if nothing is attached.
        reducers: tower name -> reducer, as text.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    dense: Count
    reduced: Count | None = None
    reducers: Mapping[str, str] = field(default_factory=dict)

    @property
    def current(self) -> Count:
        """The count of the model as it was given."""
        return self.dense if self.reduced is None else self.reduced

    @property
    def total(self) -> int:
        """Multiply-adds of the model as it was given."""
        return self.current.total

    @property
    def by_module(self) -> Mapping[str, int]:
        """Multiply-adds by module of the model as it was given."""
        return self.current.by_module

    @property
    def by_operator(self) -> Mapping[str, int]:
        """Multiply-adds by operator of the model as it was given."""
        return self.current.by_operator

    @property
    def unsupported(self) -> Mapping[str, int]:
        """Operators without a formula, of both counts: name -> calls (the larger number)."""
        return _larger([count.unsupported for count in self._counts()])

    @property
    def ratio(self) -> float:
        """Reduced over dense; 1 where nothing is attached."""
        return self.total / self.dense.total if self.dense.total else 1.0

    def table(self, depth: int = 3) -> str:
        """A table of the modules down to `depth` levels, then what was not counted.

        Raises:
            ValueError: `depth` is below 0.
        """
        if depth < 0:
            raise ValueError(f"depth={depth}: expected 0 (the total alone) or more")
        names = [name for name in self.dense.by_module if _depth(name) <= depth and self._largest(name)]
        rows = [self._row(name) for name in names]
        headers = ["module", "dense", "reduced", "ratio"][: len(rows[0]) if rows else 2]
        body = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=["left"] + ["right"] * 9)
        return "\n".join([self._title(), "", body, "", *self._footer()])

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report, as JSON."""
        return json.dumps({**dataclasses.asdict(self), "ratio": self.ratio}, indent=indent)

    def __str__(self) -> str:
        return self.table()

    def _counts(self) -> list[Count]:
        return [self.dense] if self.reduced is None else [self.dense, self.reduced]

    def _largest(self, name: str) -> int:
        return max(count.by_module.get(name, 0) for count in self._counts())

    def _row(self, name: str) -> list[str]:
        values = [count.by_module.get(name, 0) for count in self._counts()]
        row = [name or "total", *(f"{value:,}" for value in values)]
        if len(values) == 2:
            row.append(f"{values[1] / values[0]:.1%}" if values[0] else "new")
        return row

    def _title(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.inputs)
        reducers = [f"{tower}: {reducer}" for tower, reducer in self.reducers.items()]
        return "\n".join([f"{self.model}, inputs {shapes}: multiply-adds", *reducers])

    def _footer(self) -> list[str]:
        zero = _larger([count.zero for count in self._counts()])
        uncalled = sorted({name for count in self._counts() for name in count.uncalled})
        return [
            f"no formula, missing from the total: {_listed(self.unsupported) or 'none'}",
            f"counted as 0 by convention: {_listed(zero) or 'none'}",
            *([f"never called (unused, or counted in their parent): {', '.join(uncalled)}"] if uncalled else []),
        ]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _larger(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The union of the operators, each with its largest number of calls."""
    union: dict[str, int] = {}
    for count in counts:
        for name, calls in count.items():
            union[name] = max(calls, union.get(name, 0))
    return dict(sorted(union.items()))


def _listed(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{calls}" for name, calls in operators.items())


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def count_flops(model: nn.Module, inputs: Inputs) -> FlopReport:
    """Multiply-adds of one forward of a model, dense and reduced.

    The model runs once, or twice if a reducer is attached, in the mode (training or not) that it is in, without
    gradients. Nothing needs to be real: a model and inputs on the meta device are counted without memory.

    Args:
        model: any module whose forward can be traced; attached or not.
        inputs: what to call it with: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: `inputs` is none of the three.
        RuntimeError: the forward cannot be traced (from torch, with its reason).
    """
    model = getattr(model, "_orig_mod", model)  # compiled code cannot be traced; what it was compiled from can
    call = as_call(inputs)
    shapes = tuple(tuple(tensor.shape) for tensor in call.tensors)
    attachment = find_attachment(model)
    if attachment is None:
        return FlopReport(type(model).__name__, shapes, _count(model, call))
    with attachment.paused():
        dense = _count(model, call)
    reduced = _count(model, call, attachment.parameters())
    reducers = {name: str(reducer) for name, reducer in attachment.reducers.items()}
    return FlopReport(type(model).__name__, shapes, dense, reduced, reducers)


def count_once(model: nn.Module, inputs: Inputs, parameters: Iterable[nn.Parameter] = ()) -> Count:
    """What one forward of a model costs as it is, attached or not.

    Args:
        model: as for `count_flops`.
        inputs: as for `count_flops`.
        parameters: those that take part without being the model's own: cross tokens.
    """
    return _count(model, as_call(inputs), parameters)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and the distinct tensors in them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    def replaced(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in place of `self.tensors`."""
        swap = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        args = tuple(_substitute(value, swap) for value in self.args)
        return args, {name: _substitute(value, swap) for name, value in self.kwargs.items()}


def as_call(inputs: Inputs) -> Call:
    """The call that `inputs` stand for.

    Raises:
        TypeError: they are no tensor, tuple or mapping.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple):
        args = inputs
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        raise TypeError(
            f"inputs is a {type(inputs).__name__}: expected a tensor, a tuple of positional arguments or a mapping of"
            " keyword arguments; wrap a single argument of another type as (argument,)"
        )
    # A tensor given twice (query, key and value, say) must stay one object: hosts ask `query is key`.
    distinct = {id(tensor): tensor for tensor in tensors_in((args, kwargs))}
    return Call(args, kwargs, tuple(distinct.values()))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for entry in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, entry.name))


def _substitute(tree: Any, swap: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return swap[id(tree)]
    if isinstance(tree, Mapping):
        return {name: _substitute(value, swap) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [_substitute(value, swap) for value in tree]
        return values if isinstance(tree, list) else tuple(values)
    return tree


class _Traceable(nn.Module):
    """The model behind the signature that the tracer takes: distinct tensors in, a list of tensors out.

    The outputs are the model's and one element of whatever each of its modules returned. The tracer drops code whose
    result reaches no output; with these witnesses a block that runs in vain (the last one of a tower whose
    second-to-last layer is read) still counts, for it costs its time.
    """

    def __init__(self, model: nn.Module, call: Call, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        # Parameters outside the model (cross tokens) must be inputs of the trace: it refuses them as constants.
        self.outside = nn.ParameterList(parameters)
        self.call = call
        self.called: set[nn.Module] = set()
        self.witnesses: list[Tensor] = []

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self.call.replaced(tensors)
        return [*tensors_in(self.model(*args, **kwargs)), *self.witnesses]

    def observe(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module."""
        self.called.add(module)
        for tensor in tensors_in(output):
            if tensor.layout is torch.strided and not tensor.is_nested and tensor.numel():
                # stack copies the element, so that the tensor itself can be freed; it counts 0
                self.witnesses.append(torch.stack([tensor[(0,) * tensor.dim()]]))

    @contextmanager
    def observing(self) -> Iterator[None]:
        hooks = [module.register_forward_hook(self.observe) for module in self.model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def uncalled(self) -> tuple[str, ...]:
        """Names of the topmost modules with parameters in which nothing was called."""
        names: list[str] = []
        for name, module in self.model.named_modules():
            inside = name.startswith(tuple(f"{parent}." for parent in names))
            if inside or self._is_output_of_attention(name) or next(module.parameters(), None) is None:
                continue
            if self.called.isdisjoint(module.modules()):
                names.append(name)
        return tuple(names)

    def _is_output_of_attention(self, name: str) -> bool:
        """nn.MultiheadAttention reads the weights of its output layer and never calls it."""
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _count(model: nn.Module, call: Call, parameters: Iterable[nn.Parameter] = ()) -> Count:
    traceable = _Traceable(model, call, parameters)
    tensors = (*call.tensors, *model.parameters())
    kernels = _MetaConvolutions() if any(tensor.is_meta for tensor in tensors) else nullcontext()
    with torch.no_grad(), _unchanged(model, tensors), traceable.observing(), kernels:
        analysis = _analysis(traceable, call.tensors)
        total = int(analysis.total())
    prefix = "model."
    by_module = {name: int(count) for name, count in analysis.by_module().items()}
    unknown = analysis.unsupported_ops()
    zero = {kind for kind in unknown if _is_zero(kind)}
    return Count(
        total=total,
        by_module={"": total, **{n.removeprefix(prefix): c for n, c in by_module.items() if n.startswith(prefix)}},
        by_operator={name: int(count) for name, count in analysis.by_operator().most_common()},
        zero={kind: unknown[kind] for kind in sorted(zero)},
        unsupported={kind: unknown[kind] for kind in sorted(unknown.keys() - zero)},
        uncalled=traceable.uncalled(),
    )


def _analysis(model: nn.Module, tensors: tuple[Tensor, ...]) -> Any:
    """fvcore's analysis with our formulas; it tells through the report what it would log."""
    with warnings.catch_warnings():
        # Importing it scripts a loss function that has nothing to do with counting, and torch deprecates scripting.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, tensors)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.set_op_handle(**_HANDLES)


class _MetaConvolutions(TorchFunctionMode):
    """Lets convolutions of meta tensors be traced.

    Padding given in numbers leads to a kernel that the tracer does not record, and that on the meta device is Python,
    which a tracer shows sizes as tensors, not as the numbers it wants. Padding given by name is recorded.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.conv1d, functional.conv2d, functional.conv3d):
            return _named_padding(func, *args, **kwargs)
        if func in (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d):
            raise RuntimeError(
                "a transposed convolution cannot be traced on the meta device, and would count 0: count this model on"
                " a real device"
            )
        return func(*args, **kwargs)


def _named_padding(
    convolve: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    if not isinstance(padding, str):
        spatial = weight.dim() - 2
        widths = [padding] * spatial if isinstance(padding, int) else list(padding) * (spatial // len(padding))
        if any(widths):
            input = functional.pad(input, [width for width in reversed(widths) for _ in range(2)])
        padding = "valid"
    return convolve(input, weight, bias, stride, padding, *args, **kwargs)


@contextmanager
def _unchanged(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo what a forward in training mode moves (random state, running statistics) and what a failed trace leaves."""
    training = any(module.training for module in model.modules())
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta] if training else []
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for buffer, before in buffers:
            if not torch.equal(buffer, before):  # writing would invalidate a graph that waits for its backward
                buffer.copy_(before)
        for module in model.modules():
            _drop_scope_hooks(module)


def _drop_scope_hooks(module: nn.Module) -> None:
    """fvcore removes the hooks that name the scopes only if the forward succeeds."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if type(hook).__module__.startswith("fvcore.")]:
            del hooks[key]


# ---------------------------------------------------------------------------------------------------------------------
# Formulas: multiply-adds of an operator from the shapes in the trace. They replace or complete fvcore's.


def _shape(value: Any) -> list[int]:
    """Sizes of a tensor in the trace.

    Raises:
        RuntimeError: the trace does not know them (nested or sparse tensors).
    """
    if not value.isCompleteTensor():
        raise RuntimeError(
            f"the trace holds a tensor of unknown shape ({value.type()}): nested and sparse tensors cannot be counted;"
            " pass padded tensors"
        )
    return list(value.type().sizes())


def _contraction(operand: int) -> _Handle:
    """matmul and its kin: every output element sums over the last axis of `operand`.

    Unlike fvcore's own formula this holds for vectors and for batch axes that broadcast.
    """

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(_shape(outputs[0])) * _shape(inputs[operand])[-1]

    return handle


def _scaled_dot_product_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and weighted values, q [..., T, D], k [..., S, D], v [..., S, E]; as eager code: no discount for masks."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _native_multi_head_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The fast path of nn.MultiheadAttention on x [B, T, C]: three projections, attention, output projection."""
    batch, tokens, channels = _shape(inputs[0])
    return batch * (4 * tokens * channels**2 + 2 * tokens**2 * channels)


def _transformer_encoder_layer(inputs: list[Any], outputs: list[Any]) -> int:
    """The fast path of nn.TransformerEncoderLayer: attention, two LayerNorms, an MLP whose first weight is [F, C]."""
    first_mlp_weight = 14  # aten::_transformer_encoder_layer_fwd(src, embed_dim, num_heads, qkv_weight, ...)
    hidden, channels = _shape(inputs[first_mlp_weight])
    tokens = prod(_shape(inputs[0])[:-1])
    return _native_multi_head_attention(inputs, outputs) + tokens * channels * (2 * hidden + 2 * 5)


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Convolution with padding given by name; weight [out, in / groups, ...]. fvcore calls them all "conv"."""
    return Counter(conv=prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:]))


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Pair by pair, as torch contracts: the product of the axes that the pair shares or that are needed later.

    fvcore reads all but two equations from a text that numpy rounds to four digits.
    """
    equation, shapes = inputs[0].toIValue(), [_shape(value) for value in inputs[1].node().inputs()]
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_named_axes(subscripts, shape) for subscripts, shape in zip(left.split(","), shapes, strict=True)]
    result = _named_axes(right, shapes[0] + shapes[-1]).keys() if arrow else _implicit_result(terms)
    path = inputs[2].toIValue() if len(inputs) > 2 else None  # set where opt_einsum is installed
    pairs = [sorted(path[i : i + 2]) for i in range(0, len(path), 2)] if path else [[0, 1]] * (len(terms) - 1)
    total = 0
    for i, j in pairs:
        second, first = terms.pop(j), terms.pop(i)
        later = {axis for axis in result if axis in first or axis in second}.union(*terms)
        sizes = {axis: max(first.get(axis, 1), second.get(axis, 1)) for axis in first | second}
        total += prod(size for axis, size in sizes.items() if axis in later or (axis in first and axis in second))
        terms.insert(len(terms) if path else 0, {axis: size for axis, size in sizes.items() if axis in later})
    return total


def _named_axes(subscripts: str, shape: Sequence[int]) -> dict[str, int]:
    """Axis name -> size; the axes of an ellipsis are named from the right, as they broadcast."""
    head, ellipsis, tail = subscripts.partition("...")
    hidden = len(shape) - len(head) - len(tail) if ellipsis else 0
    names = [*head, *(f".{i}" for i in range(hidden, 0, -1)), *tail]
    return dict(zip(names, shape, strict=False))


def _implicit_result(terms: Sequence[Mapping[str, int]]) -> set[str]:
    """Without "->" the axes that occur once, and those of the ellipsis, remain."""
    names = [name for term in terms for name in term]
    return {name for name in names if names.count(name) == 1 or name.startswith(".")}


_HANDLES: dict[str, _Handle] = {
    "aten::scaled_dot_product_attention": _scaled_dot_product_attention,
    "aten::_native_multi_head_attention": _native_multi_head_attention,
    "aten::_transformer_encoder_layer_fwd": _transformer_encoder_layer,
    "aten::_convolution_mode": _convolution_mode,
    "aten::einsum": _einsum,
    "aten::matmul": _contraction(0),
    "aten::mv": _contraction(0),
    "aten::dot": _contraction(0),
    "aten::inner": _contraction(0),
    "aten::linalg_vecdot": _contraction(0),
    "aten::baddbmm": _contraction(1),
    "aten::addmv": _contraction(1),
}


# ---------------------------------------------------------------------------------------------------------------------
# What counts 0 by fvcore's convention, as opposed to what nobody has a formula for

# Those that torch does not tag as pointwise: softmax, reductions and order; activations and normalisations that are
# elementwise where they are written out in Python; indexing; shapes and copies; new and random tensors; max pooling.
_UNTAGGED = """
    softmax _softmax log_softmax _log_softmax logsumexp mean sum prod std var std_mean var_mean norm linalg_norm
    linalg_vector_norm cumsum cumprod amax amin aminmax argmax argmin sort argsort topk any all bincount searchsorted
    bucketize isin equal
    hardswish hardsigmoid hardtanh relu6 leaky_relu prelu mish glu softplus selu celu elu rms_norm _fused_rms_norm
    embedding one_hot scatter scatter_add scatter_reduce index_add index_copy index_fill index_select index_put
    masked_scatter masked_select take take_along_dim
    expand_as view_as reshape_as clone alias lift_fresh repeat repeat_interleave tile flip movedim moveaxis swapaxes
    swapdims unflatten diagonal diag diag_embed tril triu pad unfold im2col col2im pixel_shuffle pixel_unshuffle
    broadcast_to broadcast_tensors meshgrid hstack vstack concat concatenate tensor_split unsafe_chunk unsafe_split
    numpy_T mT real imag view_as_complex view_as_real _cast_Float float half bfloat16 long int bool cpu cuda item
    is_nonzero _shape_as_tensor scalar_tensor IntImplicit FloatImplicit Float Bool __or__ __xor__ __lshift__ __rshift__
    empty_like ones_like fill zero new_ones linspace eye rand rand_like randn randn_like randint randperm bernoulli
    uniform normal multinomial native_dropout feature_dropout
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d
"""
_ZERO = frozenset(_UNTAGGED.split())


def _is_zero(kind: str) -> bool:
    """Whether an operator is elementwise (by torch's own tag), or one of those above."""
    namespace, _, name = kind.partition("::")
    if namespace != "aten":
        return namespace == "profiler" or name == "PythonOp._NoopSaveInputs"  # marks of torch's own; no arithmetic
    name = name.removesuffix("_") if not name.endswith("__") else name
    packet = getattr(torch.ops.aten, name, None)
    pointwise = packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
    return pointwise or name in _ZERO
