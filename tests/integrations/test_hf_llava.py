"""transformers' LLaVA-1.5: the contract, and prompts, generation and training with fewer image features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hf_models
import pytest
import torch
from hf_models import DENSE, IMAGE, VERSION, images, prompts
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.models.llava import modeling_llava

import contract
import crossget
from contract import Case
from crossget.integrations import hf_llava
from crossget.methods.reducers import Reducer

R = 2
REDUCED = 17 + 1 - 3 * R - 1  # tokens and the cross token, behind three blocks, without the class token
ANSWER = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000}  # which no answer holds


def case(id: str, **settings: Any) -> Any:
    # Compiled prompts have to fit already, see below. What transformers leaves behind to record hidden states cannot be
    # pickled, attached or not.
    skipped = int(hf_llava._RETURNS_FEATURES_ONLY)
    sdpa = settings.get("attention", "sdpa") == "sdpa"
    flags = {"shortens": True, "compiles": False, "pickles": False, "fused": sdpa, "skipped": skipped}
    if "vision_feature_layer" in settings:
        flags["skipped"] = 0
        flags["shortens"] = settings["vision_feature_layer"] == -1
    return pytest.param(Case(id, partial(hf_models.llava, **settings), batch, R, **flags), id=id)


def batch() -> tuple[Tensor, ...]:
    ids, mask = prompts("^ab#cdef", "^abcd#ef")
    return ids, images(2), mask


CASES = [
    case("sdpa"),
    case("eager", attention="eager"),
    case("last_layer", vision_feature_layer=-1),
    case("with_class_token", vision_feature_select_strategy="full"),
]


@pytest.mark.parametrize("probe", contract.PROBES, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(lambda id: "eager" not in id, CASES))  # CLIP's, tested as such
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    if "with_class_token" in case.id:
        case = Case(**{**case.__dict__, "inputs": batch_with_class_token})
    probe(case)


def batch_with_class_token() -> tuple[Tensor, ...]:
    ids, _ = prompts("^ab#cdef", "^abcd#ef")
    first = ids.eq(IMAGE).int().argmax(1)
    rows = [torch.cat([row[:at], row[at : at + 1], row[at:]]) for row, at in zip(ids, first.tolist(), strict=True)]
    return torch.stack(rows), images(2), torch.ones(2, ids.shape[1] + 1, dtype=torch.long)


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = hf_models.llava()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 makes all images, and all answers, alike
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def attached(model: nn.Module) -> Iterator[crossget.Attachment]:
    with crossget.attach(model, crossget.CrossGET(r=R)) as handle:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(0, 0.3)
        yield handle


def short(ids: Tensor, keep: int = REDUCED) -> Tensor:
    """The prompts a processor would write that knows of the reduction: made row by row, without crossget's code."""
    rows = []
    for row in ids.tolist():
        seen, kept = 0, []
        for token in row:
            seen += token == IMAGE
            if token != IMAGE or (seen - 1) % DENSE < keep:
                kept.append(token)
        rows.append(kept)
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def answers(model: Any, ids: Tensor, mask: Tensor | None, pixels: Tensor | None, **more: Any) -> Tensor:
    """What comes behind the prompts."""
    given = {} if pixels is None else {"pixel_values": pixels}
    out: Tensor = model.generate(input_ids=ids, attention_mask=mask, **given, **{**ANSWER, **more})
    torch.testing.assert_close(out[:, : ids.shape[1]], ids, rtol=0, atol=0)  # the caller's own prompt
    return out[:, ids.shape[1] :]


def one_by_one(model: Any, rows: list[str]) -> Tensor:
    """The same answers without batch, padding, cache or long prompts."""
    found, used = [], 0
    for row in rows:
        ids, _ = prompts(row)
        count = row.count("#")
        pixels = images(8)[used : used + count] if count else None
        used += count
        now = short(ids)
        for _ in range(ANSWER["max_new_tokens"]):  # type: ignore[call-overload]
            with torch.no_grad():
                logits = model(input_ids=now, pixel_values=pixels, attention_mask=torch.ones_like(now)).logits
            now = torch.cat([now, logits[:, -1:].argmax(-1)], 1)
        found.append(now[0, -ANSWER["max_new_tokens"] :])  # type: ignore[operator]
    return torch.stack(found)


BATCHES = {
    "one image each": ["^ab#cdef", "^abcd#ef"],
    "padding": ["^a#bcdefgh", "^#c"],
    "several images": ["^a#b#c", "^#def"],
    "adjacent images": ["^a##b", "^cd##e"],
    "no image in one row": ["^a#b", "^cd"],
    "more tokens where fewer images": ["^a#b#c", "^#defghijklmnopqrstuvwxyzdefgh"],
}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_batches_answer_as_their_rows(model: Any, attached: crossget.Attachment, rows: list[str]) -> None:
    ids, mask = prompts(*rows)
    expected = one_by_one(model, rows)
    pixels = images(8)[: sum(row.count("#") for row in rows)]
    assert torch.equal(answers(model, ids, mask, pixels), expected)
    assert attached.tokens["visual"] == [18, 16, 14, 12]
    assert len(set(map(tuple, expected.tolist()))) == len(rows)  # the answers tell the rows apart


def test_prompts_that_fit_already(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#bcdefgh", "^#c")
    fitting = short(ids)
    expected = answers(model, ids, mask, images(2))
    assert torch.equal(answers(model, fitting, (fitting != 0).long(), images(2)), expected)


WAYS: dict[str, dict[str, Any]] = {
    "without cache": {"use_cache": False},
    "without mask": {"attention_mask": None},
    "static cache": {"cache_implementation": "static"},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 5": {"prefill_chunk_size": 5},
    "chunks of 13": {"prefill_chunk_size": 13},
    "limit on the whole": {"max_new_tokens": None, "max_length": 25 + 8},
    "limit in a configuration": {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(max_length=25 + 8, do_sample=False, pad_token_id=0),
    },
}  # fmt: skip


def unsupported(way: str) -> str:
    """What the installed transformers cannot do for a dense LLaVA either."""
    if way.startswith("chunks") and VERSION < (5, 17):
        return "transformers has no chunked prefill for images before 5.17"
    if way == "static cache" and VERSION < (4, 52):
        return "LLaVA has no static cache before 4.52"
    return ""


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(model: Any, attached: crossget.Attachment, way: str) -> None:
    if reason := unsupported(way):
        pytest.skip(reason)
    rows = ["^a#bcdefgh", "^#cdeabcd"]
    ids, mask = prompts(*rows)
    assert ids.shape[1] == 25
    expected = one_by_one(model, rows)
    more = dict(WAYS[way])
    mask = more.pop("attention_mask", mask)
    assert torch.equal(answers(model, ids, mask, images(2), **more), expected)


def test_no_way_is_skipped_on_the_newest() -> None:
    assert VERSION < (5, 17) or not any(map(unsupported, WAYS))


def test_rows_without_mask_that_lose_different_numbers(model: Any, attached: crossget.Attachment) -> None:
    rows = BATCHES["several images"]
    ids, mask = prompts(*rows)
    assert torch.equal(answers(model, ids, None, images(3)), answers(model, ids, mask, images(3)))


def test_beams(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#bcdefgh", "^#c")
    more = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True, **ANSWER}
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(2), **more)
    assert out.sequences.shape == (4, ids.shape[1] + 8)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    alone = [answers(model, ids[i : i + 1], mask[i : i + 1], images(2)[i : i + 1], num_beams=3) for i in range(2)]
    assert torch.equal(out.sequences[::2, ids.shape[1] :], torch.cat(alone))


@pytest.mark.parametrize("helper", ["assistant", "prompt lookup"])
def test_assisted(model: Any, attached: crossget.Attachment, helper: str) -> None:
    """Several tokens are checked in one forward with a filled cache: no cross token belongs there."""
    ids, mask = prompts("^a#bcdefgh")
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        if VERSION < (5, 0):
            pytest.skip("transformers refuses an assistant of text for a model of images before 5.0")
        torch.manual_seed(1)
        more = {"assistant_model": LlamaForCausalLM(model.config.text_config).eval()}
    assert torch.equal(answers(model, ids, mask, images(1), **more), one_by_one(model, ["^a#bcdefgh"]))


def test_a_second_turn_with_the_cache_of_the_first(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#bcdefgh", "^#c")
    more = {**ANSWER, "return_dict_in_generate": True}
    first = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(2), **more)
    cache = {"cache": first.cache} if "cache" in first else {"past_key_values": first.past_key_values}
    then = torch.cat([first.sequences, prompts("xyz", "uvw")[0]], 1)
    seen = torch.cat([mask, torch.ones(2, then.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    expected = answers(model, then, seen, images(2))
    assert torch.equal(answers(model, then, seen, None, **cache), expected)


def test_a_streamer_gets_what_is_generated(model: Any, attached: crossget.Attachment) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    ids, mask = prompts("^a#bcdefgh")
    streamer = Streamer()
    expected = answers(model, ids, mask, images(1), streamer=streamer)
    assert streamer.seen == [*short(ids)[0].tolist(), *expected[0].tolist(), -1]


def embeddings(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.skipif(VERSION < (4, 52), reason="LLaVA takes pixels or embeddings, not both, before 4.52")
def test_prompts_as_embeddings(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#bcdefgh", "^#c")
    given = {"inputs_embeds": embeddings(model, ids), "attention_mask": mask, "pixel_values": images(2)}
    assert torch.equal(model.generate(**given, **ANSWER), answers(model, ids, mask, images(2)))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=images(2)).logits
        real = short(ids) != 0
        assert torch.equal(model(**given).logits[real], expected[real])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_forward_of_a_padded_batch(model: Any, attached: crossget.Attachment, left: bool) -> None:
    rows = ["^ab#cdef", "^#c", "^d#e#f"]
    ids, mask = prompts(*rows, left=left)
    labels = ids.masked_fill((ids == IMAGE) | (ids == 1) | (mask == 0), -100)  # 1: nothing real is in front of it
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=images(4), labels=labels)
    lengths = [len(short(prompts(row)[0])[0]) for row in rows]
    assert out.logits.shape[1] == max(lengths)
    used, losses = 0, []
    for row, length, logits in zip(rows, lengths, out.logits, strict=True):
        single, count = short(prompts(row)[0]), row.count("#")
        pixels, used = images(4)[used : used + count], used + count
        target = single.masked_fill((single == IMAGE) | (single == 1), -100)
        with torch.no_grad():
            alone = model(input_ids=single, attention_mask=torch.ones_like(single), pixel_values=pixels, labels=target)
        found = logits[-length:] if left else logits[:length]
        torch.testing.assert_close(found, alone.logits[0], rtol=1e-4, atol=1e-5)
        kept = int((target[:, 1:] != -100).sum())
        losses.append((float(alone.loss), kept))
    mean = sum(loss * kept for loss, kept in losses) / sum(kept for _, kept in losses)
    assert float(out.loss) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("offset", [0, 3])
def test_positions_follow(model: Any, attached: crossget.Attachment, offset: int) -> None:
    ids, mask = prompts("^ab#cdef", "^#c")
    fitting = short(ids)
    own = (mask.cumsum(1) - 1).clamp(min=0) + offset
    expected = ((fitting != 0).long().cumsum(1) - 1).clamp(min=0) + offset
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update({name: kwargs[name] for name in ("position_ids", "attention_mask")})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    model(input_ids=ids, attention_mask=mask, pixel_values=images(2), position_ids=own)
    hook.remove()
    assert torch.equal(seen["attention_mask"], (fitting != 0).long())
    assert torch.equal(seen["position_ids"][fitting != 0], expected[fitting != 0])


def test_as_many_positional_arguments_as_one_likes(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cdef")
    with torch.no_grad():
        named = model(input_ids=ids, pixel_values=images(1), attention_mask=mask)
        assert torch.equal(model(ids, images(1), mask).logits, named.logits)
        assert torch.equal(model.generate(ids, pixel_values=images(1), **ANSWER)[:, ids.shape[1] :],
                           answers(model, ids, mask, images(1)))  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "pixels", "message"),
    [
        (
            ["^ab" + "#" * 2],
            1,
            r"\[32\] image tokens for 1 images.* 16 .* 11 here\), or 11",
        ),
        (["^ab"], 1, r"\[0\] image tokens for 1 images"),
        (["^a#", "^b#"], 3, r"\[16, 16\] image tokens for 3 images"),
    ],
)
def test_prompts_that_do_not_match(
    model: Any, attached: crossget.Attachment, rows: list[str], pixels: int, message: str
) -> None:
    ids, mask = prompts(*rows)
    for call in (model, partial(model.generate, **ANSWER)):
        with pytest.raises(ValueError, match=message):
            call(input_ids=ids, attention_mask=mask, pixel_values=images(pixels))


def test_an_image_that_is_cut_off(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#b", "^cd#")
    moved = torch.cat([torch.cat([ids[0], ids[1, -1:]])[1:][None], torch.cat([ids[1, :1], ids[1, :-1]])[None]])
    with pytest.raises(ValueError, match="Give every image of the batch whole"):
        model(input_ids=torch.where(moved == 0, 7, moved), attention_mask=mask, pixel_values=images(2))


def test_a_mask_that_cannot_follow(model: Any, attached: crossget.Attachment) -> None:
    ids, _ = prompts("^a#b")
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1])
    with pytest.raises(ValueError, match=r"attention_mask .*\[1, 1, 19, 19\].*\[B, T\]"):
        model(input_ids=ids, attention_mask=mask, pixel_values=images(1))


# The cross tokens ---------------------------------------------------------------------------------------------------


def test_at_the_beginning_of_text_in_the_prefill_only(model: Any, attached: crossget.Attachment) -> None:
    """Seen from outside: what each decoder layer gets and what its predecessor gave, in every step of a generation."""
    ids, mask = prompts("^a#bcdefgh", "^#c")
    layers = attached.towers["text"].blocks
    inputs: list[Tensor] = []
    hooks = [layer.input_layernorm.register_forward_pre_hook(lambda _, a: inputs.append(a[0])) for layer in layers]
    outputs: list[Tensor] = []
    hooks += [layer.register_forward_hook(lambda _, args, out: outputs.append(_first(out))) for layer in layers]
    answers(model, ids, mask, images(2), max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    cross = attached.cross_tokens["text"]
    depth, first = len(layers), (short(ids) != 0).int().argmax(1)
    assert first.tolist() == [0, 7]
    for step in range(4):
        for layer in range(1, depth):
            before, now = outputs[step * depth + layer - 1], inputs[step * depth + layer]
            if step == 0:
                moved = (now - before).abs().amax(-1) > 0
                assert moved.nonzero().tolist() == [[0, 0], [1, 7]]  # nowhere else, and never on padding
                difference = torch.stack([(now - before)[row, at] for row, at in enumerate(first.tolist())])
                torch.testing.assert_close(difference, cross[layer].expand(2, -1), rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(now, before)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def test_language_models_are_not_reduced(model: Any) -> None:
    with pytest.raises(ValueError, match=r"'text' .*generates.* r = 0"):
        crossget.attach(model, {"visual": crossget.CrossGET(r=2), "text": crossget.CrossGET(r=2)})
    assert not hasattr(model, "_crossget_seat")
    crossget.attach(model, crossget.CrossGET(r=2)).detach()  # nothing was left half attached


def test_one_reducer_is_the_references(attached: crossget.Attachment) -> None:
    visual, text = attached.reducers["visual"], attached.reducers["text"]
    assert (visual.importance, visual.keys, visual.cross_token, visual.r) == ("attention", "mean_heads", True, R)  # type: ignore[attr-defined]
    assert (text.cross_token, text.r) == (True, 0)


@pytest.mark.parametrize("method", [crossget.CrossGET(r=R, strip_cross_token=True), crossget.ToMe(r=R)])
def test_without_the_cross_token_among_the_features(model: Any, method: Reducer) -> None:
    ids, mask = prompts("^ab#cdef")
    with crossget.attach(model, method), torch.no_grad():
        length = model(input_ids=ids, attention_mask=mask, pixel_values=images(1)).logits.shape[1]
        assert length == ids.shape[1] - DENSE + 16 - 3 * R
        fitting = short(ids, 16 - 3 * R)
        assert torch.equal(
            answers(model, ids, mask, images(1)), answers(model, fitting, torch.ones_like(fitting), images(1))
        )


def test_nothing_removed_but_the_cross_token_there(model: Any) -> None:
    """At r = 0 there is one feature more than the processor thought."""
    ids, mask = prompts("^ab#cdef", "^#c")
    with crossget.attach(model, crossget.CrossGET(r=0)), torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=images(2))
        assert out.logits.shape[1] == ids.shape[1] + 1
        assert answers(model, ids, mask, images(2)).shape == (2, 8)


# Work nobody asked for ----------------------------------------------------------------------------------------------


def calls_of_last_block(model: Any, attached: crossget.Attachment, call: Callable[[], Any]) -> int:
    """How often the attention of the image tower's last block runs."""
    seen: list[int] = []
    hook = attached.towers["visual"].blocks[-1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    call()
    hook.remove()
    return len(seen)


def test_the_block_that_nobody_reads_is_not_run(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cdef")
    generate = partial(answers, model, ids, mask, images(1))
    assert calls_of_last_block(model, attached, generate) == 0
    read = partial(answers, model, ids, mask, images(1), vision_feature_layer=-1)
    assert calls_of_last_block(model, attached, read) == 1
    tower = attached.towers["visual"]
    parts = model if "vision_tower" in model._modules else model.model
    assert calls_of_last_block(model, attached, lambda: parts.vision_tower(images(1))) == 1
    # From 5.0 on a forward gives the tower's last hidden state away.
    forward = partial(model, input_ids=ids, attention_mask=mask, pixel_values=images(1))
    assert calls_of_last_block(model, attached, forward) == int(not hf_llava._RETURNS_FEATURES_ONLY)
    assert len(tower.blocks) == 4


def test_its_cross_token_is_trained_all_the_same(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cdef", "^#c")
    model(input_ids=ids, attention_mask=mask, pixel_values=images(2))
    attached.alignment_loss().backward()
    visual, text = (attached.cross_tokens[name].grad for name in ("visual", "text"))
    assert visual is not None
    assert text is not None
    assert (visual.abs().amax(1) > 0).all()
    assert (text.abs().amax(1) > 0).all()


def test_images_align_with_their_own_prompts(model: Any, attached: crossget.Attachment) -> None:
    """Two images in one row, none in another: as if each image had a row of its own."""
    ids, mask = prompts("^a#b#", "^cd", "^#e")
    model(input_ids=ids, attention_mask=mask, pixel_values=images(3))
    together = attached.alignment_loss().detach()
    first = prompts("^a#b#")
    model(input_ids=first[0], attention_mask=first[1], pixel_values=images(3)[:2])
    a = attached.alignment_loss().detach()
    second = prompts("^#e")
    model(input_ids=second[0], attention_mask=second[1], pixel_values=images(3)[2:])
    b = attached.alignment_loss().detach()
    torch.testing.assert_close(together, (2 * a + b) / 3, rtol=1e-5, atol=1e-6)


def test_several_layers_are_read_on_the_full_grid() -> None:
    torch.manual_seed(0)
    model = hf_models.llava(vision_feature_layer=[-3, -2]) if VERSION >= (4, 50) else None
    if model is None:
        pytest.skip("LLaVA reads one layer before 4.50")
    ids, mask = prompts("^ab#cdef")
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(r=R)) as attached:
        out = model(input_ids=ids, attention_mask=mask, pixel_values=images(1))
        assert out.logits.shape[1] == ids.shape[1]
        assert attached.tokens["visual"] == [18, 16, 14, 12]


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not contract.COMPILES or VERSION < (5, 0), reason="LLaVA branches on its data before 5.0")
def test_compiles_to_one_graph(model: Any, attached: crossget.Attachment) -> None:
    del model.get_decoder().layers[1:]  # the more of them, the longer it takes
    ids = short(prompts("^ab#cdef", "^abcd#ef")[0])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=images(2)).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        out = compiled(input_ids=ids, attention_mask=mask, pixel_values=images(2)).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# Coming off ----------------------------------------------------------------------------------------------------------


def test_a_detached_model_generates_as_before(model: Any) -> None:
    ids, mask = prompts("^a#bcdefgh", "^#c")
    dense = answers(model, ids, mask, images(2))
    signature = inspect.signature(model.generate)
    with crossget.attach(model, crossget.CrossGET(r=R)):
        assert inspect.signature(model.generate) == signature
        answers(model, ids, mask, images(2))
    assert "generate" not in model.__dict__
    assert torch.equal(answers(model, ids, mask, images(2)), dense)


def test_a_pixtral_tower_is_refused() -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**hf_models.TEXT), image_token_index=IMAGE)
    with pytest.raises(TypeError, match="PixtralVisionModel: no adapter"):
        crossget.attach(LlavaForConditionalGeneration(config), crossget.CrossGET(r=2))


def test_the_base_model_alone(model: Any) -> None:
    if not hasattr(modeling_llava, "LlavaModel"):
        pytest.skip("LLaVA has no base model before 4.52")
    ids, mask = prompts("^ab#cdef")
    with torch.no_grad(), crossget.attach(model.model, crossget.CrossGET(r=R)):
        hidden = model.model(input_ids=ids, attention_mask=mask, pixel_values=images(1)).last_hidden_state
        assert hidden.shape[1] == ids.shape[1] - DENSE + REDUCED


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generates_on_a_gpu(model: Any, dtype: torch.dtype) -> None:
    """The cached answers of a padded batch are those of its rows, and of a forward without cache."""
    model.to("cuda", dtype)
    ids, mask = (x.cuda() for x in prompts("^a#bcdefgh", "^#c"))
    pixels = images(2).to("cuda", dtype)
    with crossget.attach(model, crossget.CrossGET(r=R)) as attached:
        assert attached.cross_tokens["visual"].is_cuda
        out = answers(model, ids, mask, pixels)
        assert out.shape == (2, 8)
        if dtype == torch.float32:
            assert torch.equal(out, answers(model, ids, mask, pixels, use_cache=False))
            alone = answers(model, *(x.cuda() for x in prompts("^#c")), pixels[1:])
            assert torch.equal(out[1:], alone)
