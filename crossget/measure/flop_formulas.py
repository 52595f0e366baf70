"""How operators count: formulas that replace or complete fvcore's, and the operators that count 0.

A formula gives the multiply-adds of one operator from the shapes in the jit trace.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Formula = Callable[[list[Any], list[Any]], "int | Counter[str]"]


def analyse(model: nn.Module, tensors: tuple[Tensor, ...]) -> Any:
    """fvcore's `FlopCountAnalysis` with the formulas of this module, and without fvcore's log messages."""
    with warnings.catch_warnings():
        # The import scripts a loss function, and torch deprecates scripting.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, tensors)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.set_op_handle(**_FORMULAS)


class MetaConvolutions(TorchFunctionMode):
    """Inside, convolutions of meta tensors can be traced.

    A convolution whose padding is a number runs a Python kernel on the meta device, which fails under the tracer,
    because sizes are tensors there. One whose padding is a name ("valid") is recorded as one operator. So numbers are
    replaced by an explicit pad and "valid".
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


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


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


def _contraction(operand: int) -> _Formula:
    """The formula of matmul and similar operators: every output element is a sum over the last axis of `operand`.

    Unlike fvcore's formula it holds for vectors and for batch axes that broadcast.
    """

    def formula(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(_shape(outputs[0])) * _shape(inputs[operand])[-1]

    return formula


def _scaled_dot_product_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and weighted values of q [..., T, D], k [..., S, D], v [..., S, E]; pairs that a mask hides count too."""
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
    """Operands are contracted pair by pair, as torch does it.

    A pair costs the product of the axes that both have or that are needed later. (fvcore takes the number from a text
    by numpy, which is rounded to four digits.)
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
    """Axis name -> size. The axes of an ellipsis are numbered from the right, because they broadcast from there."""
    head, ellipsis, tail = subscripts.partition("...")
    hidden = len(shape) - len(head) - len(tail) if ellipsis else 0
    names = [*head, *(f".{i}" for i in range(hidden, 0, -1)), *tail]
    return dict(zip(names, shape, strict=False))


def _implicit_result(terms: Sequence[Mapping[str, int]]) -> set[str]:
    """Without "->" the axes that occur once, and those of the ellipsis, remain."""
    names = [name for term in terms for name in term]
    return {name for name in names if names.count(name) == 1 or name.startswith(".")}


_FORMULAS: dict[str, _Formula] = {
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
# Operators that count 0 by fvcore's convention, as opposed to operators without a formula

# Those that torch does not tag as pointwise, by line: softmax, reductions and sorting; activations and normalisations
# that are elementwise where they are written out in Python; indexing; shapes and copies; new and random tensors; max
# pooling.
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
    is_nonzero numel _shape_as_tensor scalar_tensor IntImplicit FloatImplicit Float Bool __or__ __xor__ __lshift__
    __rshift__
    empty_like ones_like fill zero new_ones linspace eye rand rand_like randn randn_like randint randperm bernoulli
    uniform normal multinomial native_dropout feature_dropout
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d
"""
_ZERO = frozenset(_UNTAGGED.split())


def counts_zero(kind: str) -> bool:
    """Whether an operator counts 0 by convention: it is elementwise by torch's own tag, or in the list above."""
    namespace, _, name = kind.partition("::")
    if namespace != "aten":
        return namespace == "profiler" or name == "PythonOp._NoopSaveInputs"  # markers without arithmetic
    name = name.removesuffix("_") if not name.endswith("__") else name
    packet = getattr(torch.ops.aten, name, None)
    pointwise = packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
    return pointwise or name in _ZERO
