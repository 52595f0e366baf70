"""transformers' BLIP, BLIP-2 and InstructBLIP: the contract, blocks written out, and what reads image tokens."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import hf_models
import pytest
import torch
from hf_models import VERSION
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2VisionModel,
    Blip2VisionModelWithProjection,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextModel,
    BlipVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVisionModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextLayer
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention
from transformers.models.instructblip import modeling_instructblip
from written_out import followed, on_the_grid

import contract
import crossget
from contract import Case
from crossget.methods.importance import by_attention
from crossget.methods.reducers import View

InstructBlipModel: Any = getattr(modeling_instructblip, "InstructBlipModel", None)
WIDE, NARROW, WORDS, QUERIES, IMAGE = 48, 32, 60, 5, 55  # IMAGE: the token id that BLIP-2 puts features for
VISION = {
    "hidden_size": NARROW, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": WORDS, "hidden_size": WIDE, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
}  # fmt: skip
QFORMER = {
    "vocab_size": WORDS, "hidden_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "encoder_hidden_size": NARROW, "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": WORDS, "hidden_size": NARROW, "ffn_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "word_embed_proj_dim": NARROW, "max_position_embeddings": 64, "dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
R, PATCHES = 2, 16
REDUCED = PATCHES + 1 - 3 * R  # image tokens behind three blocks, without the cross token


class Asked(BlipForQuestionAnswering):
    """Whose forward shows what the text encoder did: the loss of the answers."""

    def forward(self, ids: Tensor, pixels: Tensor, answers: Tensor, mask: Tensor) -> Any:
        return super().forward(input_ids=ids, pixel_values=pixels, labels=answers, attention_mask=mask)


def blip(cls: Any) -> Any:
    # Its decoder attends to questions with layers made for images, so all are of one width.
    text = {**TEXT, "hidden_size": NARROW} if issubclass(cls, BlipForQuestionAnswering) else TEXT
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=24, image_text_hidden_size=24)
    parts = {BlipVisionModel: config.vision_config, BlipTextModel: config.text_config}
    return hf_models.built(cls, parts.get(cls, config), "eager")


def blip2(cls: Any, attention: str) -> Any:
    of_instructions = cls.__name__.startswith("Instruct")
    make = InstructBlipConfig if of_instructions else Blip2Config
    settings = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": QUERIES}
    config = make(**settings, image_token_index=IMAGE, image_text_hidden_size=24)
    config.image_token_id = IMAGE
    if cls is Blip2ForImageTextRetrieval:
        config.qformer_config.use_qformer_text_input = True
        config.image_token_index = None
    alone = cls in (Blip2VisionModel, InstructBlipVisionModel)
    if alone:
        return hf_models.built(cls, config.vision_config, attention)
    model: Any = hf_models.built(cls, config, attention if VERSION >= (5, 0) else "eager")  # the Q-Former's, before 5.0
    model.vision_model.config._attn_implementation = attention
    return model


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def texts(begin: int = 1, lengths: tuple[int, ...] = (10, 7)) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, padded on the right."""
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(4))
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths]).long()
    ids[:, 0] = begin
    return ids * mask, mask


def with_features() -> tuple[Tensor, Tensor]:
    """Prompts of BLIP-2: as many image tokens as there are queries, then text, padded on the left."""
    ids, mask = (part.flip(1) for part in texts())
    image = torch.full((2, QUERIES), IMAGE)
    return torch.cat([image, ids], 1), torch.cat([torch.ones_like(image), mask], 1)


def of_contrast() -> tuple[Any, ...]:
    ids, mask = texts()
    return ids, pixels(), mask


def of_retrieval(itm: bool) -> tuple[Any, ...]:
    ids, mask = texts()
    return ids, pixels(), itm, mask


def of_question() -> tuple[Any, ...]:
    ids, mask = texts()
    return ids, pixels(), texts(lengths=(6, 6))[0], mask


def of_caption() -> tuple[Any, ...]:
    return (pixels(), *texts())


def of_prompt() -> tuple[Any, ...]:
    return (pixels(), *with_features())


def of_instruction() -> tuple[Any, ...]:
    return (pixels(), *texts(lengths=(6, 4)), *with_features())


def of_matching(itm: bool) -> tuple[Any, ...]:
    return (pixels(), *texts(), itm)


def of_image() -> tuple[Any, ...]:
    return (pixels(),)


def case(id: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], **flags: Any) -> Any:
    flags = {"shortens": True, "fused": False, "compiles": False, **flags}
    return pytest.param(Case(id, make, inputs, R, **flags), id=id)


def case2(cls: Any, inputs: Callable[[], tuple[Any, ...]], id: str = "", **flags: Any) -> list[Any]:
    """A case for either attention, where a version has both."""
    kinds = () if cls is None else ("sdpa", "eager") if FUSED else ("eager",)
    make, id = partial(blip2, cls), id or getattr(cls, "__name__", "")
    return [case(f"{id}_{kind}", partial(make, kind), inputs, fused=kind == "sdpa", **flags) for kind in kinds]


FUSED = "_attn_implementation" in inspect.getsource(Blip2Attention)
# Older versions: every text block returns its keys and values, wanted or not.
HANDS_ON = "present_key_value" in inspect.getsource(BlipTextLayer.forward)
CASES = [
    case("BlipModel", partial(blip, BlipModel), of_contrast, hands_on=HANDS_ON),
    case("retrieval_itm", partial(blip, BlipForImageTextRetrieval), partial(of_retrieval, True), hands_on=HANDS_ON),
    case("retrieval_itc", partial(blip, BlipForImageTextRetrieval), partial(of_retrieval, False), hands_on=HANDS_ON),
    case("question_answering", partial(blip, Asked), of_question, hands_on=HANDS_ON),
    case("captioning", partial(blip, BlipForConditionalGeneration), of_caption),
    case("BlipVisionModel", partial(blip, BlipVisionModel), of_image, shortens=False),
    case("BlipTextModel", partial(blip, BlipTextModel), texts, shortens=False, hands_on=HANDS_ON),
]
CASES2 = [
    *case2(Blip2ForConditionalGeneration, of_prompt),
    *case2(Blip2Model, of_prompt),
    *case2(Blip2ForImageTextRetrieval, partial(of_matching, True), "matching"),
    *case2(Blip2ForImageTextRetrieval, partial(of_matching, False), "contrast"),
    *case2(Blip2VisionModelWithProjection, of_image),
    *case2(Blip2VisionModel, of_image, shortens=False),
    *case2(InstructBlipForConditionalGeneration, of_instruction),
    *case2(InstructBlipModel, of_instruction),
    *case2(InstructBlipVisionModel, of_image, shortens=False),
]
# Under autocast the dense model fails, too: it puts features into embeddings of another type.
UNLIKE_TYPES = "= language_model_inputs.flatten()" in inspect.getsource(InstructBlipForConditionalGeneration.forward)


def both_kinds(id: str) -> bool:
    """The blocks are the same in all classes of a family: either attention for one, in the default run."""
    return "eager" not in id or not FUSED or id.startswith(("Blip2ForC", "matching", "InstructBlipForC"))


@pytest.mark.parametrize("probe", contract.OTHERS, ids=contract.name)
@pytest.mark.parametrize("case", CASES + contract.slow_unless(both_kinds, CASES2))
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    if probe is contract.autocast_works and UNLIKE_TYPES and "InstructBlipFor" in case.id:
        pytest.skip("this transformers cannot run InstructBLIP under autocast")
    probe(case)


def has_blocks_of_its_own(id: str) -> bool:
    return both_kinds(id) and not id.startswith(
        ("retrieval_itc", "contrast", "Blip2Model", "InstructBlipModel", "BlipVision", "BlipText", "Blip2Vision",
         "InstructBlipVision")
    )  # fmt: skip


@pytest.mark.parametrize("probe", contract.OF_BLOCKS, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(has_blocks_of_its_own, CASES + CASES2))
def test_contract_of_blocks(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + CASES2)
def test_every_kind_compiles(case: Case) -> None:
    if "matching" in case.id and VERSION >= (5, 0):
        pytest.skip("transformers cannot compile it: traced, the Q-Former's mask has rows for its text, too")
    contract.compiles_to_one_graph(dataclasses.replace(case, compiles=True))


def test_every_class_is_there_on_the_newest() -> None:
    assert VERSION < (5, 0) or (FUSED and InstructBlipModel is not None and not UNLIKE_TYPES)


# Against blocks written out ------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (4, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class ImageLayer:
    """The image tower's block in three steps, as its authors wrote it."""

    def keys(self, block: Any, x: Tensor) -> Parts:
        q, k, v = block.self_attn.qkv(block.layer_norm1(x)).chunk(3, -1)
        return heads(q), heads(k), heads(v)

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.self_attn.projection(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.layer_norm2(x))))


@dataclasses.dataclass
class TextLayer:
    """The text encoder's block: its residual comes before the norm, and the attention to the image behind that."""

    image: Tensor | None

    def keys(self, block: Any, x: Tensor) -> Parts:
        inner = block.attention.self
        return heads(inner.query(x)), heads(inner.key(x)), heads(inner.value(x))

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.attention.output.dense(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        x = block.attention.output.LayerNorm(x)
        if self.image is not None:
            inner, output = block.crossattention.self, block.crossattention.output
            q, k, v = heads(inner.query(x)), heads(inner.key(self.image)), heads(inner.value(self.image))
            x = output.LayerNorm(x + output.dense(attend(q, k, v, torch.zeros(()))))
        return block.output.LayerNorm(x + block.output.dense(F.gelu(block.intermediate.dense(x))))


def explicit(
    host: Any, blocks: list[nn.Module], reducer: Any, cross: Tensor | None, x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The reduced tower written out: the tokens that are left, with the cross token, and the full grid.

    Args:
        host: how its blocks compute.
        blocks: of the tower.
        reducer: what removes tokens.
        cross: [L, C] or None. In an image the cross token starts as the class token and lives on; in a text it copies
            the first token before every block.
        x: [B, T, C] what the first block gets.
        mask: [B, T] of a text; None of an image.
    """
    batch, length, _ = x.shape
    if cross is not None:
        x = torch.cat([x, x[:, :1]], 1)
    position = source = torch.arange(x.shape[1]).expand(batch, -1)
    valid = None if mask is None else F.pad(mask.bool(), (0, x.shape[1] - length), value=True)
    protected = (position == 0) | (position >= length)
    sizes = torch.ones(x.shape[:2])
    for layer, block in enumerate(blocks):
        if cross is not None:
            origin = x[:, -1] if mask is None else x[:, 0]
            x = torch.cat([x[:, :-1], (origin + cross[layer])[:, None]], 1)
        bias = sizes.log()[:, None, None, :]
        if valid is not None:
            bias = bias.masked_fill(~valid[:, None, None, :], -torch.inf)
        q, k, v = host.keys(block, x)
        x = host.residual(block, x, attend(q, k, v, bias))
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1).mean(1)
        guide = torch.zeros(batch, dtype=torch.long) if mask is not None else None
        if guide is None and cross is not None:
            guide = torch.full((batch,), x.shape[1] - 1)
        n_protected = 1 + (cross is not None)
        reduced = reducer.reduce(
            View(x, q, k, by_attention(weights, valid), sizes, protected, n_protected, valid, guide), reducer.r
        )
        assert reduced is not None
        x, sizes, plan = reduced
        protected, source = protected.gather(1, plan.kept), followed(source, plan)
        valid = None if valid is None else valid.gather(1, plan.kept)
        x = host.rest(block, x)
    return x, on_the_grid(x, source[:, :length], valid, 0, cross is not None)


WRITTEN = ["BlipVisionModel", "BlipTextModel", "BlipModel", "retrieval_itm", "question_answering"]


def chosen(*ids: str) -> list[Any]:
    return [param for param in CASES + CASES2 if param.id in ids or param.id.rpartition("_")[0] in ids]


@pytest.mark.parametrize("cross_token", [True, False])
@pytest.mark.parametrize("case", chosen(*WRITTEN, "Blip2VisionModel"))
def test_equals_the_blocks_written_out(case: Case, cross_token: bool) -> None:
    model, inputs = contract.build(case)
    importance = "cross_token" if cross_token else "attention"
    reducer = crossget.CrossGET(R, cross_token=cross_token, importance=importance, ties="stable")
    with crossget.attach(model, contract.everywhere(model, reducer)) as attached, torch.no_grad():
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.3)
        starts, ends = {}, {}
        for name, tower in attached.towers.items():
            tower.blocks[0].register_forward_pre_hook(lambda _, args, name=name: starts.update({name: args[0]}))
            tower.blocks[-1].register_forward_hook(lambda _, __, out, name=name: ends.update({name: first(out)}))
        out = model(*inputs)
        cross = attached.cross_tokens
        image = None
        if "visual" in attached.towers:
            tower = attached.towers["visual"]
            tokens, grid = explicit(
                ImageLayer(), tower.blocks, attached.reducers["visual"], cross.get("visual"), starts["visual"], None
            )
            expected = grid if tower.restore else tokens[:, : tokens.shape[1] - cross_token]
            assert (ends["visual"] - expected).abs().max() < 1e-5 * float(expected.abs().max())
            image = getattr(model, "vision_model", model).post_layernorm(expected)
            seen = out.vision_model_output[0] if "vision_model_output" in out else out.last_hidden_state
            torch.testing.assert_close(seen, image, rtol=1e-4, atol=1e-5)
        if "text" in attached.towers:
            mask = inputs[-1]
            tower = attached.towers["text"]
            layer = TextLayer(image if case.id in ("retrieval_itm", "question_answering") else None)
            _, expected = explicit(
                layer, tower.blocks, attached.reducers["text"], cross.get("text"), starts["text"], mask
            )
            assert (ends["text"] - expected).abs().max() < 1e-5 * float(expected.abs().max())


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.skipif(not FUSED, reason="this version has one attention only")
@pytest.mark.parametrize("importance", ["cross_token", "attention"])
@pytest.mark.parametrize("case", [param for param in CASES2 if "sdpa" in param.id])
def test_eager_equals_sdpa(case: Case, importance: Any) -> None:
    reducer = crossget.CrossGET(R, importance=importance, ties="stable")
    found = []
    for kind in ("sdpa", "eager"):
        make = partial(case.make.func, case.make.args[0], kind)  # type: ignore[attr-defined]
        model, inputs = contract.build(dataclasses.replace(case, make=make))
        with crossget.attach(model, reducer) as attached:
            found.append((contract.run(model, inputs), attached.source["visual"]))
    (fused, source), (plain, again) = found
    assert torch.equal(source, again)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not FUSED, reason="this version has one attention only")
def test_a_kernel_that_hides_attention_is_replaced_while_attached() -> None:
    model = blip2(Blip2VisionModel, "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with crossget.attach(model, crossget.CrossGET(R)):
        assert model.config._attn_implementation == "sdpa"
        contract.run(model, of_image())
    assert model.config._attn_implementation == "flash_attention_2"


# What reads image tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def seen() -> dict[str, list[int]]:
    """Which modules attended to how many tokens of something else."""
    return {}


def watch(model: nn.Module, seen: dict[str, list[int]]) -> None:
    """Note how many keys each attention to something else gets, and that masks have as many."""

    def count(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name.partition(".")[0], []).append(args[0].shape[1])

    def compare(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and mask.dim() == 2:
            assert mask.shape == states.shape[:2]
            seen.setdefault("masks", []).append(mask.shape[1])

    for name, module in model.named_modules():
        if "crossattention" in name and name.endswith(".key"):
            module.register_forward_pre_hook(partial(count, name))
        if type(module).__name__.endswith(("TextModel", "QFormerModel")):
            module.register_forward_pre_hook(compare, with_kwargs=True)


def question() -> dict[str, Tensor]:
    ids, mask = texts(lengths=(9, 9))
    return {"pixel_values": pixels(), "input_ids": ids, "attention_mask": mask}


def of_generation(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """A model that generates, what it gets, and which of its modules attends to the image."""
    prompt, mask = with_features()
    image, written = {"pixel_values": pixels()}, {"pixel_values": pixels(), "input_ids": prompt, "attention_mask": mask}
    instruction = dict(zip(("qformer_input_ids", "qformer_attention_mask"), texts(lengths=(6, 4)), strict=True))
    kinds: dict[str, tuple[Any, dict[str, Any], str]] = {
        "caption": (partial(blip, BlipForConditionalGeneration), image, "text_decoder"),
        "caption with a prompt": (partial(blip, BlipForConditionalGeneration), question(), "text_decoder"),
        "answer": (partial(blip, BlipForQuestionAnswering), question(), "text_encoder"),
        "BLIP-2": (partial(blip2, Blip2ForConditionalGeneration, "sdpa"), image, "qformer"),
        "BLIP-2 with a prompt": (partial(blip2, Blip2ForConditionalGeneration, "sdpa"), written, "qformer"),
        "InstructBLIP": (
            partial(blip2, InstructBlipForConditionalGeneration, "sdpa" if FUSED else "eager"),
            {**written, **instruction},
            "qformer",
        ),
    }
    make, given, reader = kinds[name]
    torch.manual_seed(1)  # answers of two rows that differ, whatever the version: see the last test
    model = make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # the usual 0.02 makes all answers alike
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
            else:
                parameter.fill_(0.0 if key.endswith("bias") else 1.0)
    return model, given, reader


GENERATING = ["caption", "caption with a prompt", "answer", "BLIP-2", "BLIP-2 with a prompt", "InstructBLIP"]
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "without cache": {"use_cache": False}}


def generate(model: Any, given: dict[str, Any], **way: Any) -> Tensor:
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "use_cache": True, **way}
    copied = {name: value.clone() for name, value in given.items()}  # BLIP writes the start of text into its input
    out: Tensor = model.generate(**copied, **settings)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, way: str, seen: dict[str, list[int]]) -> None:
    model, given, reader = of_generation(name)
    dense = generate(model, given, **WAYS[way])
    nothing = crossget.CrossGET(0, cross_token=False, guided_matching=False, ensemble="size")
    with crossget.attach(model, contract.everywhere(model, nothing)):
        assert torch.equal(generate(model, given, **WAYS[way]), dense)
    attached = crossget.attach(model, contract.everywhere(model, crossget.CrossGET(R)))
    watched = copy.deepcopy(model)  # hooks and all: they are not taken off again
    watch(watched, seen)
    out = generate(watched, given, **WAYS[way])
    assert out.shape == dense.shape
    assert set(seen.pop(reader)) == {REDUCED}
    assert seen.pop("masks")[0] == REDUCED
    for counts in seen.values():  # the decoder of answers attends to all of the question
        assert set(counts) == {given["input_ids"].shape[1]}
    assert torch.equal(generate(model, given, **WAYS[way]), out)
    for row in range(2):  # batches answer as their rows
        alone = {key: value[row : row + 1] for key, value in given.items()}
        assert torch.equal(generate(model, alone, **WAYS[way]), out[row : row + 1])
    if way != "beams":  # steps with a cache answer as whole forwards do
        assert torch.equal(generate(model, given), out)
    attached.detach()
    assert torch.equal(generate(model, given, **WAYS[way]), dense)


def test_answers_tell_rows_apart() -> None:
    """Otherwise the test above would show little."""
    for name in GENERATING:
        model, given, _ = of_generation(name)
        dense = generate(model, given)
        with crossget.attach(model, contract.everywhere(model, crossget.CrossGET(R))):
            out = generate(model, given)
        assert not torch.equal(out[0, -7:], out[1, -7:]), name
        assert not torch.equal(out, dense), name


def test_answers_see_the_encoder_reduced(seen: dict[str, list[int]]) -> None:
    """With r in the text encoder too, its blocks hand on fewer tokens, and the decoder still gets the full question."""
    model, given, _ = of_generation("answer")
    with crossget.attach(model, {"text": crossget.CrossGET(1)}) as attached:
        watch(model, seen)
        generate(model, given)
        assert attached.tokens["text"] == [10, 9, 8]
    assert set(seen["text_encoder"]) == {PATCHES + 1}
    assert set(seen["text_decoder"]) == {9}


READERS = {"retrieval_itm": "text_encoder", "question_answering": "text_encoder", "captioning": "text_decoder"}


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe])
@pytest.mark.parametrize("case", [*chosen(*READERS), *(param for param in CASES2 if "VisionModel_" not in param.id)])
def test_image_tokens_are_as_planned(case: Case, method: Any, seen: dict[str, list[int]]) -> None:
    model, inputs = contract.build(case)
    with crossget.attach(model, contract.everywhere(model, method(R))):
        watch(model, seen)
        contract.run(model, inputs)
    assert set(seen[READERS.get(case.id, "qformer")]) == {REDUCED}


def test_features_of_images_and_texts_together(seen: dict[str, list[int]]) -> None:
    """BlipModel has methods of its own for one side, and one in which the text attends to the image."""
    model, inputs = contract.build(chosen("BlipModel")[0].values[0])
    ids, image, mask = inputs
    with crossget.attach(model, contract.everywhere(model, crossget.CrossGET(R))) as attached, torch.no_grad():
        watch(model, seen)
        out = model(*inputs)
        assert set(seen) == set()
        model.get_multimodal_features(input_ids=ids, pixel_values=image, attention_mask=mask)
        assert set(seen["text_model"]) == {REDUCED}
        sides = (model.get_image_features(image), model.get_text_features(ids, mask))
        assert attached.tokens == {"visual": [18, 16, 14], "text": [11, 9, 7]}
    for found, expected in zip(sides, (out.image_embeds, out.text_embeds), strict=True):
        features = getattr(found, "pooler_output", found)
        torch.testing.assert_close(F.normalize(features, dim=-1), expected)


def test_larger_images() -> None:
    model, _ = contract.build(chosen("captioning")[0].values[0])
    with crossget.attach(model, crossget.CrossGET(R)) as attached, torch.no_grad():
        out = model(torch.randn(2, 3, 48, 40), *texts(), interpolate_pos_encoding=True)
        assert attached.tokens["visual"] == [32, 30, 28]
    assert out.image_embeds.shape[1] == 31 - 3 * R


@pytest.mark.parametrize("method", [crossget.ToMe, crossget.CrossGET])
def test_image_tokens_that_are_hidden_from_the_text(method: Any) -> None:
    """As if they were not there."""
    model, (ids, mask) = contract.build(chosen("BlipTextModel")[0].values[0])
    image, hidden = torch.randn(2, 6, NARROW), torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)

    def pair() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            all_tokens = model(ids, mask, encoder_hidden_states=image, encoder_attention_mask=hidden)
            return all_tokens[0], model(ids, mask, encoder_hidden_states=image[:, :4])[0]

    if not torch.allclose(*pair(), atol=1e-5):
        pytest.skip("this transformers does not hand BLIP's mask over image tokens to the attention")
    with crossget.attach(model, method(R)):
        torch.testing.assert_close(*pair(), rtol=1e-5, atol=1e-5)


# Padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random])
def test_padding_joins_padding_only(method: Any, dtype: torch.dtype) -> None:
    """It is what the mask hides, whatever its token ids are."""
    model, (ids, _) = contract.build(chosen("BlipTextModel")[0].values[0])
    mask = torch.tensor([[1] * 10, [1] * 5 + [0] * 5])
    with crossget.attach(model.to(dtype), method(R)) as attached:
        contract.run(model, (ids.clamp(min=7), mask))
        source = attached.source["text"]
    assert len(source[1].unique()) < 10
    assert set(source[1, :5].tolist()).isdisjoint(source[1, 5:].tolist())
    assert (source[:, 1:] != 0).all()  # the token that is read out stays alone
    assert source[0, 5:].unique().numel() < 5 or source[0, :5].unique().numel() < 5


def test_padding_does_not_change_what_a_text_becomes() -> None:
    model, (ids, mask) = contract.build(chosen("BlipTextModel")[0].values[0])
    with crossget.attach(model, crossget.CrossGET(0)) as attached, torch.no_grad():
        nn.init.normal_(attached.cross_tokens["text"], std=0.3)
        few = model(ids, mask).last_hidden_state
        many = model(F.pad(ids, (0, 6)), F.pad(mask, (0, 6))).last_hidden_state
    torch.testing.assert_close(many[:, :10][mask.bool()], few[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [crossget.CrossGET(3, ties="stable", importance="attention"), crossget.ToMe(crossget.Ratio(0.3)), crossget.Ward(2)],
    ids=repr,
)
def test_a_text_is_what_it_is_alone(method: Any) -> None:
    model = contract.build(chosen("BlipTextModel")[0].values[0])[0].double()
    lengths = torch.tensor([10, 7, 4, 2])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(7, 40, (4, 12)).masked_fill(mask == 0, 0)
    with crossget.attach(model, method), torch.no_grad():
        together = model(ids, mask).last_hidden_state
        for row, n in enumerate(lengths.tolist()):
            alone = model(ids[row, None, :n], mask[row, None, :n]).last_hidden_state
            torch.testing.assert_close(together[row, None, :n], alone, rtol=0, atol=1e-6)


# Training -----------------------------------------------------------------------------------------------------------


def losses(id: str, model: Any) -> Tensor:
    """The loss that the host trains with, or one of its scores'."""
    ids, mask = texts()
    prompt, prompt_mask = with_features()
    instruction = dict(zip(("qformer_input_ids", "qformer_attention_mask"), texts(lengths=(6, 4)), strict=True))
    target = prompt.masked_fill((prompt == IMAGE) | (prompt_mask == 0), -100)
    written = {"pixel_values": pixels(), "input_ids": prompt, "attention_mask": prompt_mask, "labels": target}
    image = {"pixel_values": pixels(), "input_ids": ids, "attention_mask": mask}
    kind = id.removesuffix("_sdpa").removesuffix("_eager")
    given = {
        "BlipModel": {**image, "return_loss": True},
        "captioning": {**image, "labels": ids.masked_fill(mask == 0, -100)},
        "Blip2ForConditionalGeneration": written,
        "InstructBlipForConditionalGeneration": {**written, **instruction},
    }
    if kind in given:
        loss: Tensor = model(**given[kind]).loss
        return loss
    if kind == "question_answering":
        return model(*of_question()).loss  # type: ignore[no-any-return]
    scores = model(**image, use_itm_head=kind == "retrieval_itm").itm_score
    return F.cross_entropy(scores, torch.tensor([0, 1]))


TRAINED = [
    "BlipModel", "retrieval_itm", "retrieval_itc", "question_answering", "captioning", "Blip2ForConditionalGeneration",
    "InstructBlipForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("case", chosen(*TRAINED))
def test_losses_train_the_towers_and_their_cross_tokens(case: Case) -> None:
    model = contract.build(case)[0]
    switch = contract._checkpointing(model)
    assert switch is not None
    found = []
    with crossget.attach(model, contract.everywhere(model, crossget.CrossGET(1))) as attached:
        for checkpointing in (False, True):
            switch(checkpointing)
            model.zero_grad()
            for parameter in attached.parameters():
                parameter.grad = None
            loss = losses(case.id, model)
            loss.backward()
            for name, cross in attached.cross_tokens.items():
                assert cross.grad is not None
                assert torch.isfinite(cross.grad).all()
                assert (cross.grad.abs().sum(1) > 0).all(), name  # of every block
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            patches = next(grad for name, grad in grads.items() if "patch_embedding" in name)
            assert torch.isfinite(patches).all()
            assert patches.abs().sum() > 0
            found.append((loss.detach(), grads, [p.grad.clone() for p in attached.parameters() if p.grad is not None]))
    plain, again = found
    assert plain[1].keys() == again[1].keys()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", chosen("BlipModel", "retrieval_itc"))
def test_cross_tokens_are_aligned_as_first_tokens_are(case: Case) -> None:
    """Either tower's first token, behind its last block, becomes the features of the host by the tower's projection."""
    model, inputs = contract.build(case)
    with crossget.attach(model, contract.everywhere(model, crossget.CrossGET(R))) as attached:
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.3)
        ends: dict[str, Tensor] = {}
        for name, tower in attached.towers.items():
            tower.blocks[-1].register_forward_hook(lambda _, __, out, name=name: ends.update({name: first(out)}))
        out = model(*inputs)
        loss = attached.alignment_loss()
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        assert all((cross.grad != 0).any(1).all() for cross in attached.cross_tokens.values())  # type: ignore[union-attr]
        image, text = (F.normalize(attached.towers[key].project(ends[key][:, 0]), dim=-1) for key in ("visual", "text"))  # type: ignore[misc]
    if case.id == "BlipModel":
        torch.testing.assert_close(image, out.image_embeds)
        torch.testing.assert_close(text, out.text_embeds)
    else:
        torch.testing.assert_close(image @ text.T, out.itm_score)


@pytest.mark.parametrize("case", chosen("question_answering", "captioning", "Blip2ForImageTextRetrieval", "contrast"))
def test_without_a_joint_space_there_is_no_alignment(case: Case) -> None:
    model, inputs = contract.build(case)
    with crossget.attach(model, contract.everywhere(model, crossget.CrossGET(R))) as attached:
        model(*inputs)
        with pytest.raises(RuntimeError, match="no projection .*: visual"):
            attached.alignment_loss()


# What is not reduced ------------------------------------------------------------------------------------------------


def test_decoders_are_refused() -> None:
    model: Any = blip(BlipForConditionalGeneration)
    assert [tower.name for tower in crossget.find_towers(model)] == ["visual"]
    with pytest.raises(TypeError, match="BlipTextLMHeadModel: .*decoder.*cache"):
        crossget.attach(model.text_decoder, crossget.CrossGET(R))
    with pytest.raises(ValueError, match=r"\['visual'\]; 'text': .*decoder"):
        crossget.attach(model, {"text": crossget.CrossGET(R)})
    answers: Any = blip(BlipForQuestionAnswering)
    decoder = {id(module) for module in answers.text_decoder.modules()}
    for tower in crossget.find_towers(answers):
        assert decoder.isdisjoint(map(id, tower.blocks))


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe])
def test_a_decoder_that_looks_like_an_encoder_fails(method: Any) -> None:
    model, given, _ = of_generation("caption with a prompt")
    decoder: Any = model.text_decoder
    # Old versions' first step brings no cache yet, and the second one stumbles over its mask or its only token before.
    words = "the text model of a decoder" if VERSION >= (4, 57) else "for the remaining tokens|no attention over"
    with crossget.attach(decoder.bert, method(1)), pytest.raises(RuntimeError, match=words):
        generate(model, given)


def test_parts_without_an_image_tower_are_refused() -> None:
    model: Any = blip2(Blip2ForConditionalGeneration, "eager")
    with pytest.raises(TypeError, match="queries and a text"):
        crossget.attach(model.qformer, crossget.CrossGET(R))
    encoder = blip(BlipModel).vision_model.encoder
    with pytest.raises(TypeError, match="no inputs are known"):
        crossget.attach(encoder, crossget.CrossGET(R))


@pytest.mark.skipif(VERSION >= (5, 0), reason="BLIP has absolute positions only since 5.0")
def test_positions_in_the_attention_are_refused() -> None:
    text = {**TEXT, "position_embedding_type": "relative_key"}
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=24)
    model = hf_models.built(BlipModel, config, "eager")
    assert [tower.name for tower in crossget.find_towers(model)] == ["visual"]
    with pytest.raises(ValueError, match="'text': .*'relative_key'"):
        crossget.attach(model, {"text": crossget.CrossGET(R)})
    with pytest.raises(RuntimeError, match="found no tower.*'relative_key' positions"):
        crossget.attach(model.text_model, crossget.CrossGET(R))
