"""Finding the towers of a model that has no adapter: one forward is watched, and what was found is proved.

1. `Probe` notes the calls of all modules in one dense forward.
2. A module is a block if one attention with its residual is recognised in its call (`Watch`). Blocks that get the very
   tensor that another block returned make a tower. A module with several attentions, whose blocks are no modules, is a
   tower by itself (loop_tower.py).
3. Rows that are equal for different inputs are class tokens, registers or queries. A tower where another last token
   changes no earlier one is causal.
4. `proofs.py` proves every block, and the whole model.

No name of a class or of a family plays a part. Two facts rest on the names of modules and parameters: the kind of a
tower (visual, text, audio, decoder), and whether the first token is a class token.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.adapters import Blocks, Tower, recognised_kernels
from crossget.core.block_class import argument_names
from crossget.core.inputs import AnyInputs, as_function, evaluating, tensors_in
from crossget.core.layout import BatchFirst
from crossget.core.probe import ModuleCall, Probe
from crossget.core.proofs import CACHES, Refused, prove_blocks, prove_model, recognise, why

# Fewer tokens than this, without the protected ones, are not worth a reduction.
MIN_TOKENS = 8
_KINDS = (
    ("decoder", r"decoder|predictor"),
    ("visual", r"vision|visual|image|pixel|video|(^|[._])vit([._]|$)|patch"),
    ("audio", r"audio|speech|sound|(^|[._])mel([._]|$)"),
    ("text", r"text|language|bert|token_emb|word"),
)
_CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)(_?(token|tok|embedding|embed|emb|pos))?s?(_?\d+)?$")


class DiscoveryWarning(UserWarning):
    """Says what `crossget.attach` has found in a model that has no adapter."""


class FoundTowers(list[Tower]):
    """The towers of a model.

    Attributes:
        refused: path of a module -> why the blocks in it cannot be reduced; empty for a model with an adapter.
        discovered: they were found in a forward, as the model has no adapter.
    """

    def __init__(self, towers: Sequence[Tower], refused: Mapping[str, str] | None = None) -> None:
        super().__init__(towers)
        self.discovered = refused is not None
        self.refused = dict(refused or {})

    def __str__(self) -> str:
        """One line per tower, with what is known about it, and one line per refusal."""
        lines = ["; ".join([str(tower), *tower.notes]) for tower in self]
        return "\n".join([*lines, *(f"{path or 'the model'}: {reason}" for path, reason in self.refused.items())])


def discover(model: nn.Module, inputs: AnyInputs) -> FoundTowers:
    """The towers of a model, found in one forward and proved by others.

    Args:
        model: in any mode. It runs in eval mode, and is left as it was.
        inputs: a tensor, a tuple, a mapping, or a function that runs the model: two different images (or texts, or
            clips), or more.

    Raises:
        TypeError: `inputs` has a wrong type.
    """
    run = as_function(model, inputs)
    with evaluating(model):
        probe = Probe(model)
        dense = probe.run(run)
        if not any(True for _ in tensors_in(dense)):
            raise TypeError(
                f"on these inputs nothing was returned that is a tensor, but {type(dense).__name__}: give inputs of "
                "the model, or a function that runs it and returns its output"
            )
        finder = _Finder(model, probe)
        refused, towers = finder.refused, list[Tower]()
        for number, chain in enumerate(finder.chains):
            before = finder.chains[number - 1] if number else None
            tower, reason = _examined(model, chain, before, run)
            if tower is not None:
                towers.append(tower)
            else:
                refused[chain[0].path.rpartition(".")[0]] = reason
        towers = _named(towers)
        reasons = prove_model(model, run, towers, dense)
    whole = "in the whole model, r = 0 gives the dense output, and a reduction the planned tokens (proved)"
    proved = [replace(tower, notes=(*tower.notes, whole)) for tower in towers if not reasons[tower.name]]
    for tower in towers:
        if reasons[tower.name]:
            refused[_where(tower)] = f"its blocks can be reduced, but the model cannot: {reasons[tower.name]}"
    return FoundTowers(_named(proved), refused)


def warn_about(model: nn.Module, found: FoundTowers) -> None:
    """Say what was found in a model that has no adapter."""
    name = type(model).__qualname__
    warnings.warn(
        f"{name} has no adapter. These towers were found by watching a forward:\n{found}\n"
        f"`crossget.register({name}, towers=crossget.find_towers(model, inputs))` keeps them",
        DiscoveryWarning,
        stacklevel=3,
    )


# Blocks ---------------------------------------------------------------------------------------------------------------


class _Chain(list[ModuleCall]):
    """The calls of the blocks of one tower, in the order they ran.

    Attributes:
        layout: of their tokens.
        loop: number of blocks that the only module runs; 0: every module is a block.
        has_sums: the host adds the same to the tokens of all inputs between two blocks.
        prefix: number of leading tokens that are protected, as far as it is known.
    """

    def __init__(self, calls: Sequence[ModuleCall], layout: BatchFirst, loop: int = 0) -> None:
        super().__init__(calls)
        self.layout, self.loop, self.has_sums, self.prefix = layout, loop, False, 0

    @property
    def batch(self) -> int:
        """B of the first call."""
        call = self[0]
        return int(self.layout.batch(call.tokens, [*call.args, *call.kwargs.values()]))


class _Finder:
    """Finds the chains of blocks among the calls of a forward.

    Attributes:
        chains: the chains.
        refused: path of a module -> why the blocks in it make no tower.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self._probe = probe
        self._calls = [call for call in probe.calls if call.out is not None]
        self._made_in: dict[ModuleCall | None, list[ModuleCall]] = {}
        for call in self._calls:
            self._made_in.setdefault(call.caller, []).append(call)
        # The layout and number of blocks of modules of one structure, or why no block was recognised in them.
        self._known: dict[tuple[type, ...], tuple[BatchFirst, int] | str] = {}
        self._counts: dict[ModuleCall, int] = {}
        for call in reversed(self._calls):  # calls that a call makes come after it
            self._counts[call] = self._count(call)
        self.chains: list[_Chain] = []
        self.refused: dict[str, str] = {}
        singles = self._link()
        self._add_loops(singles)
        self._explain(model, singles)

    def _count(self, call: ModuleCall) -> int:
        """The number of blocks in a call."""
        inside = sum(self._counts[other] for other in self._made_in.get(call, []))
        return inside if inside > 1 else max(inside, self._recognised(call))

    def _recognised(self, call: ModuleCall) -> int:
        """The number of blocks that are recognised in a call."""
        structure = _structure(call.module)
        if structure not in self._known:
            try:
                self._known[structure] = recognise(call)
            except Refused as reason:
                self._known[structure] = str(reason)
        known = self._known[structure]
        return 0 if isinstance(known, str) else known[1]

    def _layout(self, call: ModuleCall) -> BatchFirst:
        known = self._known[_structure(call.module)]
        assert not isinstance(known, str)
        return known[0]

    def _link(self) -> list[ModuleCall]:
        """Make chains of the outermost modules with one block. Return those that belong to no chain."""
        chains: list[_Chain] = []
        for call in self._calls:
            if self._counts[call] != 1 or not self._recognised(call):
                continue
            if call.caller is not None and self._counts.get(call.caller) == 1:
                continue  # a part of a block
            for chain in reversed(chains):
                link = _link_of(chain[-1], call)
                if link is not None:
                    chain.append(call)
                    chain.has_sums = chain.has_sums or link == "sum"
                    break
            else:
                chains.append(_Chain([call], self._layout(call)))
        for chain in chains:
            if len(chain) > 1:
                self._add(chain)
        return [chain[0] for chain in chains if len(chain) == 1]

    def _add_loops(self, singles: Sequence[ModuleCall]) -> None:
        """Make chains of modules that run several blocks themselves."""
        in_loops = Counter(call.caller for call in singles if call.caller is not None)
        for call in self._calls:
            recognised = in_loops[call] > 1 or (self._counts[call] > 1 and _structure(call.module) in self._known)
            if recognised and self._recognised(call) > 1:
                self._add(_Chain([call], self._layout(call), self._recognised(call)))

    def _add(self, chain: _Chain) -> None:
        used = {part for one in self.chains for call in one for part in call.module.modules()}
        if used.isdisjoint(call.module for call in chain):  # otherwise the tower ran before, with other tokens
            self.chains.append(chain)

    def _explain(self, model: nn.Module, singles: Sequence[ModuleCall]) -> None:
        """Note why lists of like modules make no tower.

        Of lists in each other, the outer one counts if its modules keep the shape of their tokens. If none does, it is
        the inner one.
        """
        used = {self._probe.paths[part] for chain in self.chains for call in chain for part in call.module.modules()}
        by_path = {call.path: call for call in self._calls}
        lists = list(_lists(model))
        for keep_shape, ordered in ((True, lists), (False, reversed(lists))):
            for path, children in ordered:
                if any(_is_part(one, path) for one in (*used, *self.refused)):
                    continue
                if any(_is_part(path, one) for one in self.refused):
                    continue
                if not keep_shape and self.chains and self._probe.attending.isdisjoint(children):
                    continue  # convolutions, say: of interest only where nothing was found
                found = (self._reason(child, by_path.get(child), singles, keep_shape) for child in children)
                reason = next(filter(None, found), None)
                if reason is not None:
                    self.refused[path] = reason
        if not self.chains and not self.refused:  # no lists: modules that attend
            for call in self._calls:
                known = self._known.get(_structure(call.module))
                if call.path in self._probe.attending and isinstance(known, str):
                    self.refused[call.path] = known
                    break

    def _reason(
        self, path: str, call: ModuleCall | None, singles: Sequence[ModuleCall], keeps_shape: bool
    ) -> str | None:
        if not keeps_shape:
            return self._probe.unlike.get(path)
        if call is None:
            return None
        known = self._known.get(_structure(call.module))
        if isinstance(known, str):
            return known
        return "something between its blocks changes the tokens" if call in singles else None


def _is_part(path: str, whole: str) -> bool:
    """Whether a module is at, or in, the path of another one."""
    return not whole or path == whole or path.startswith(f"{whole}.")


def _structure(module: nn.Module) -> tuple[type, ...]:
    """The classes of a module and of all its parts."""
    return tuple(type(part) for part in module.modules())


def _link_of(before: ModuleCall, call: ModuleCall) -> str | None:
    """How a call gets the output of another one: "same", "sum" (plus the same for all inputs), or None: it does not."""
    out, tokens = before.out, call.tokens
    if out is None or out.shape != tokens.shape or out.device != tokens.device:
        return None
    if out is tokens or torch.equal(out, tokens):
        return "same"
    if out.dim() != 3 or before.module is call.module:
        return None
    axis = 0 if "BTC" in call.equal_rows and out.shape[0] > 1 else 1
    added = (tokens - out).movedim(axis, 0)
    is_same = torch.allclose(added, added[:1].expand_as(added), atol=1e-5 * float(out.abs().max()))
    return "sum" if is_same and len(added) > 1 else None


def _lists(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The paths of modules with several like children, and of these children: of one class, with children."""
    for path, module in model.named_modules():
        children = [
            (name, child) for name, child in module.named_children() if next(child.children(), None) is not None
        ]
        classes = Counter(type(child) for _, child in children)
        like = [f"{path}.{name}" if path else name for name, child in children if classes[type(child)] > 1]
        if like:
            yield path, like


# Facts ----------------------------------------------------------------------------------------------------------------


def _examined(
    model: nn.Module, chain: _Chain, before: _Chain | None, run: Callable[[], Any]
) -> tuple[Tower | None, str]:
    """The tower of a chain, proved; or None, and why it cannot be reduced. See `_tower_of` for the arguments."""
    try:
        return _tower_of(model, chain, before, run), ""
    except Exception as error:  # a block's own code, on other tokens than it expects
        return None, why(error)


def _tower_of(model: nn.Module, chain: _Chain, before: _Chain | None, run: Callable[[], Any]) -> Tower:
    """The tower of a chain, proved.

    Args:
        model: the model.
        chain: the calls of its blocks.
        before: the chain that was found before; None: it is the first one.
        run: runs the model.

    Raises:
        Refused: it cannot be reduced.
    """
    first, layout = chain[0], chain.layout
    names = {name for call in chain for name in argument_names(type(call.module).forward)}
    batch = chain.batch
    length = int(layout.to_batch(first.tokens, batch).shape[1])
    causal = _is_causal(first, layout, batch)
    if causal and CACHES & names:
        raise Refused("it is causal and can keep a cache: it is a language model that generates")
    kind = _kind(first, model)
    prefix, fixed, notes = _protected(first, layout, batch, length, kind)
    if not prefix and not fixed and before is not None and kind == _kind(before[0], model):
        prefix = _handed_on(chain, before, run)
        notes = [f"{_first_tokens(prefix)} independent of all but protected ones (seen)"] if prefix else notes
    chain.prefix = prefix
    if length - prefix - len(fixed) < MIN_TOKENS:
        raise Refused(f"{length} tokens, {prefix + len(fixed)} of them protected, are too few to reduce")
    named = any(_CLASS_TOKEN.search(name) for name, _ in model.named_parameters())
    has_class_token = named and prefix > 0 and kind != "text"
    if has_class_token:
        notes.append("class token (assumed, by the name of a parameter)")
    if chain.has_sums:
        notes.append("the host adds the same to all inputs between blocks; a merged token gets what its place gets")
    masks = any("mask" in name for name in (*names, *argument_names(type(model).forward)))
    path = _path(chain, model)
    tower = Tower(
        kind, Blocks(path, model), int(first.tokens.shape[-1]), prefix=prefix, fixed=fixed, causal=causal,
        class_token=has_class_token, padding=masks, layout=layout, loop=chain.loop,
        guided=kind == "visual", overrides=recognised_kernels(model, path), notes=notes,
    )  # fmt: skip
    return prove_blocks(tower, chain)


def _is_causal(call: ModuleCall, layout: BatchFirst, batch: int) -> bool:
    """Whether another token in the middle changes the output of later tokens, and of no earlier one."""
    if layout.axes == "NC":
        return False
    tokens = layout.to_batch(call.tokens, batch)
    middle = int(tokens.shape[1]) // 2
    other = torch.cat([tokens[:, :middle], tokens[:, middle : middle + 1].flip(-1) + 1, tokens[:, middle + 1 :]], 1)
    before, after = (
        layout.to_batch(_first(call.module(layout.from_batch(x), *call.args, **call.kwargs)), batch)
        for x in (tokens, other)
    )
    later = slice(middle + 1, None)
    return torch.equal(before[:, :middle], after[:, :middle]) and not torch.equal(before[:, later], after[:, later])


def _first(out: Any) -> Tensor:
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _protected(
    call: ModuleCall, layout: BatchFirst, batch: int, length: int, kind: str
) -> tuple[int, tuple[int, ...], list[str]]:
    """The prefix, the other protected positions (from the end), and how they were found.

    Raises:
        Refused: no token depends on the input.
    """
    if kind == "text":
        return 1, (), ["prefix 1 (assumed: the token that begins a text)"]
    if batch < 2:
        raise Refused("it got one input: give two different ones, as tokens that are equal for both are protected")
    equal = call.equal_rows[layout.axes]
    if bool(equal.all()):
        raise Refused(
            "its tokens are equal for all inputs: they are queries, or the inputs are equal (give two different ones)"
        )
    prefix = int((~equal).int().argmax())
    fixed = tuple(int(i) - length for i in equal.nonzero().flatten() if int(i) >= prefix)
    if len(fixed) > 3 * length // 4:
        raise Refused(f"{len(fixed)} of its {length} tokens are equal for all inputs: give inputs that differ more")
    notes = [f"{_first_tokens(prefix)} equal for all inputs (seen)"]
    if fixed:
        notes.append(f"{len(fixed)} more such tokens at {fixed[0]} to {fixed[-1]} (seen)")
    return prefix, fixed, notes


def _first_tokens(prefix: int) -> str:
    """Which tokens a prefix is, with the verb."""
    return "no first token is" if not prefix else "the first token is" if prefix == 1 else f"the first {prefix} are"


def _handed_on(chain: _Chain, before: _Chain, run: Callable[[], Any]) -> int:
    """The prefix of a later stage of a pyramid: its first tokens that depend on those in the prefix before only.

    The model runs once more, with other tokens after the prefix behind the stage before.
    """
    if not before.prefix:
        return 0
    found: list[Tensor] = []

    def change(module: nn.Module, args: Any, out: Any) -> Any:
        tokens = before.layout.to_batch(_first(out), before.batch)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
        other = torch.cat([tokens[:, : before.prefix], (tokens + noise)[:, before.prefix :]], 1)
        other = before.layout.from_batch(other)
        return (other, *out[1:]) if isinstance(out, tuple) else other

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        names = argument_names(type(module).forward)
        found.append(args[0] if args else kwargs[names[0]])

    hooks = [
        before[-1].module.register_forward_hook(change),
        chain[0].module.register_forward_pre_hook(note, with_kwargs=True),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not found or found[0].shape != chain[0].tokens.shape:
        return 0
    tokens, other = (chain.layout.to_batch(x, chain.batch) for x in (chain[0].tokens, found[0]))
    equal = (tokens == other).all(-1).all(0)
    prefix = int((~equal).int().argmax()) if not bool(equal.all()) else 0
    return prefix if prefix <= before.prefix else 0


def _kind(call: ModuleCall, model: nn.Module) -> str:
    """The kind of a tower: by names, else by the layer that made its tokens, else by the model's main input.

    The names are those of its path, and of the classes of its blocks and of the model.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", f"{type(call.module).__name__} {type(model).__name__}").lower()
    for names in (call.path.lower(), words):
        for kind, pattern in _KINDS:
            if re.search(pattern, names):
                return kind
    main = str(getattr(model, "main_input_name", ""))
    by_input = "text" if main == "input_ids" else "audio" if main in ("input_features", "input_values") else "visual"
    return call.stem or by_input


def _path(chain: _Chain, model: nn.Module) -> str | list[str]:
    """The path to a list with exactly the blocks of a chain; otherwise the path of every block."""
    paths = [call.path for call in chain]
    parent = paths[0].rpartition(".")[0]
    listed: Any = model.get_submodule(parent)
    is_list = isinstance(listed, nn.ModuleList | nn.Sequential) and not chain.loop
    if parent and is_list and list(listed.children()) == [call.module for call in chain]:
        return parent
    return paths


def _where(tower: Tower) -> str:
    """The path of a tower, for messages."""
    path = tower.blocks.path if isinstance(tower.blocks, Blocks) else ""
    return path if isinstance(path, str) else path[0] if tower.loop else f"{path[0]} to {path[-1]}"


def _named(towers: Sequence[Tower]) -> list[Tower]:
    """The towers, with numbers in the names of those of one kind: visual.0, visual.1."""
    kinds = Counter(tower.name.partition(".")[0] for tower in towers)
    numbers: Counter[str] = Counter()
    named = []
    for tower in towers:
        kind = tower.name.partition(".")[0]
        named.append(replace(tower, name=kind if kinds[kind] == 1 else f"{kind}.{numbers[kind]}"))
        numbers[kind] += 1
    return named
