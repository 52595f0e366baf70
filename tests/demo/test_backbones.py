"""Backbones by name: which host, which weights, and what happens where nobody answers."""

import pickle
import socket
import ssl
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from crossget.demo import backbones as hosts
from crossget.demo.backbones import find, is_offline, load_weights, make

TINY = "test_vit"


def weights_of(seed: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(timm.create_model(TINY, **options).state_dict())


class TestFind:
    def test_open_clip_and_timm_names(self) -> None:
        assert find("ViT-B-16") == ("open_clip", "ViT-B-16")
        assert find("vit_tiny_patch16_224") == ("timm", "vit_tiny_patch16_224")
        assert find("vit_tiny_patch16_224.augreg_in21k") == ("timm", "vit_tiny_patch16_224.augreg_in21k")

    def test_a_host_in_front_decides(self) -> None:
        assert find("timm:convnext_base") == ("timm", "convnext_base")
        assert find("open_clip:convnext_base") == ("open_clip", "convnext_base")

    def test_a_name_of_both_is_refused(self) -> None:
        with pytest.raises(ValueError, match="open_clip:convnext_base or timm:convnext_base"):
            find("convnext_base")

    def test_an_unknown_name_gets_close_ones_whatever_their_case(self) -> None:
        with pytest.raises(ValueError, match="no model 'vit-b16' in open_clip .* did you mean ViT-B-16"):
            find("vit-b16")
        with pytest.raises(ValueError, match="did you mean .*vit_tiny_patch16_224"):
            find("vit_tiny_patch16")

    def test_a_name_like_no_other_is_sent_to_the_list(self) -> None:
        with pytest.raises(ValueError, match="`crossget models` lists them"):
            find("zzzzzzzz")

    def test_a_missing_host_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = hosts._import
        monkeypatch.setattr(hosts, "_import", lambda host: None if host == "open_clip" else real(host))
        assert find(TINY) == ("timm", TINY)
        with pytest.raises(ValueError, match=r'open_clip .*"crossget\[open-clip\]"'):
            find("ViT-B-16")
        with pytest.raises(RuntimeError, match=r'open_clip .*"crossget\[open-clip\]"'):
            find("open_clip:ViT-B-16")

    def test_no_host_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hosts, "_import", lambda host: None)
        with pytest.raises(RuntimeError, match=r'pip install "crossget\[open-clip,timm\]"'):
            find(TINY)


class TestMake:
    def test_random_weights_depend_on_the_seed_alone(self) -> None:
        one, same, other = (make(TINY, pretrained="none", seed=seed).model.state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not torch.equal(one["patch_embed.proj.weight"], other["patch_embed.proj.weight"])

    def test_is_in_evaluation_mode_with_the_hosts_preprocessing(self) -> None:
        from PIL import Image

        backbone = make(TINY, pretrained="none")
        assert not backbone.model.training
        assert backbone.random
        assert backbone.random_reason == ""
        assert backbone.title == f"timm {TINY} (random weights)"
        assert backbone.preprocess(Image.new("RGB", (300, 200))).shape == (3, *backbone.image_size)

    @pytest.mark.parametrize(
        "name",
        [TINY, "ViT-B-32", *[pytest.param(n, marks=pytest.mark.slow) for n in ("coca_ViT-B-32", "ViT-B-16-SigLIP")]],
    )
    def test_meta_models_and_made_up_inputs_fit(self, name: str) -> None:
        backbone = make(name, device="meta")
        assert {p.device.type for p in backbone.model.parameters()} == {"meta"}
        inputs = backbone.random_inputs(2, text=backbone.has_text_tower)
        assert all(x.is_meta for x in inputs)
        assert inputs[0].shape == (2, 3, *backbone.image_size)
        with torch.no_grad():
            assert len(backbone.image_features(inputs[0])) == 2
            if backbone.has_text_tower:
                assert len(backbone.text_features(inputs[1])) == 2

    def test_without_network_the_default_goes_on_with_random_weights(self) -> None:
        backbone = make(TINY)
        assert backbone.random
        assert backbone.random_reason == "weights 'r160_in1k' are not in the cache, and HF_HUB_OFFLINE is set"

    def test_without_network_a_tag_asked_for_is_an_error(self) -> None:
        with pytest.raises(ConnectionError, match="'r160_in1k'.*HF_HUB_OFFLINE"):
            make(TINY, pretrained="r160_in1k")

    def test_an_unknown_tag_is_an_error_that_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match="test_vit .*'best'.*r160_in1k"):
            make(TINY, pretrained="best")

    def test_a_model_that_nobody_trained_says_so(self) -> None:
        backbone = make("ViT-S-16", device="cpu")
        assert backbone.random_reason == "open_clip has no pretrained weights for ViT-S-16"

    def test_the_clip_default_is_openai(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hosts._Maker, "_downloaded", lambda self, tag, what: tag)
        assert make("ViT-B-16") == "openai"
        assert make("ViT-B-16-SigLIP") == "webli"

    def test_what_a_host_raises_itself_is_not_taken_for_a_missing_network(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise KeyError("blocks.0")

        monkeypatch.setattr(hosts, "_make_timm", broken)
        with pytest.raises(KeyError, match=r"blocks\.0"):
            make(TINY)


class TestFiles:
    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_weights_arrive(self, suffix: str, tmp_path: Path) -> None:
        path, weights = tmp_path / f"w.{suffix}", weights_of()
        save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
        backbone = make(TINY, checkpoint=path)
        assert not backbone.random
        assert backbone.weights == str(path)
        state = backbone.model.state_dict()
        assert all(torch.equal(state[key], weights[key]) for key in weights)

    def test_training_files_are_unwrapped(self, tmp_path: Path) -> None:
        weights = weights_of()
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "w"
        )
        assert load_weights(tmp_path / "w").keys() == weights.keys()

    def test_a_fine_tuned_number_of_classes_is_taken_over(self, tmp_path: Path) -> None:
        save_file(weights_of(num_classes=7), tmp_path / "w.safetensors")
        backbone = make(TINY, checkpoint=tmp_path / "w.safetensors")
        assert backbone.model(backbone.random_inputs(1, text=False)[0]).shape == (1, 7)

    def test_a_file_of_another_architecture_is_refused(self, tmp_path: Path) -> None:
        weights = weights_of()
        weights["stranger"] = weights.pop("cls_token")
        weights["pos_embed"] = torch.zeros(1, 5, 64)
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="does not fit test_vit: ") as caught:
            make(TINY, checkpoint=tmp_path / "w.safetensors")
        for part in ("1 missing (cls_token)", "1 unknown (stranger)", "1 of another shape (pos_embed)"):
            assert part in str(caught.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere.*safetensors or torch"):
            load_weights(tmp_path / "nowhere")

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "sprung",))

        (tmp_path / "w.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
        torch.save({"state_dict": Trap()}, tmp_path / "w2.pt")
        for name in ("w.pt", "w2.pt"):
            with pytest.raises(ValueError, match="weights_only=True.* save the model's state_dict"):
                load_weights(tmp_path / name)
        assert not (tmp_path / "sprung").exists()

    def test_files_without_tensors(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"w\.pt contains no tensors, only epoch"):
            load_weights(tmp_path / "w.pt")
        torch.save([1, 2], tmp_path / "w2.pt")
        with pytest.raises(ValueError, match=r"w2\.pt .*list.*state dict"):
            load_weights(tmp_path / "w2.pt")
        (tmp_path / "w.safetensors").write_text("no tensors")
        with pytest.raises(ValueError, match=r"w\.safetensors .*safetensors file"):
            load_weights(tmp_path / "w.safetensors")


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """A machine that takes one connection, and answers or keeps silent."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    connection.recv(4096)  # until the other side gives up

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)


class TestNetwork:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)

    def test_a_hub_that_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with server(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as url:
            monkeypatch.setattr(constants, "ENDPOINT", url)
            assert hosts._hub_answers(5.0)

    def test_a_hub_that_keeps_silent_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with server(None) as url:
            monkeypatch.setattr(constants, "ENDPOINT", url)
            start = time.perf_counter()
            assert not hosts._hub_answers(0.3)
            assert time.perf_counter() - start < 5

    def test_a_hub_that_refuses_is_given_up_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert not hosts._hub_answers(5.0)

    def test_a_name_service_that_hangs_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Hanging:
            def head(self, url: str, timeout: float) -> None:
                time.sleep(30)

        monkeypatch.setattr("huggingface_hub.utils.get_session", Hanging)
        start = time.perf_counter()
        assert not hosts._hub_answers(0.1)
        assert time.perf_counter() - start < 10

    def test_without_an_answer_the_host_is_not_left_to_try_again_and_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hosts, "_hub_answers", lambda seconds: False)
        timeout = socket.getdefaulttimeout()
        start = time.perf_counter()
        backbone = make(TINY)
        assert time.perf_counter() - start < 15  # the hub's own client would take most of a minute
        assert (
            backbone.random_reason
            == f"weights 'r160_in1k' are not in the cache, and {constants.ENDPOINT} cannot be reached"
        )
        assert not constants.HF_HUB_OFFLINE
        assert socket.getdefaulttimeout() == timeout

    def test_an_error_that_is_not_the_networks_comes_through(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken:
            def head(self, url: str, timeout: float) -> None:
                raise AttributeError("head")

        monkeypatch.setattr("huggingface_hub.utils.get_session", Broken)
        with pytest.raises(AttributeError, match="head"):
            hosts._hub_answers(1.0)


def caused_by(cause: BaseException, hidden: bool = False) -> BaseException:
    """An error as hosts make them: raised while another one was being handled."""
    try:
        try:
            raise cause
        except BaseException as error:
            if hidden:
                raise RuntimeError("another matter") from None
            raise RuntimeError(f"could not load: {error}")  # noqa: B904  # as open_clip does
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        socket.gaierror(-2, "Name or service not known"),
        ssl.SSLError("certificate verify failed"),
        urllib.error.URLError("no route"),
        LocalEntryNotFoundError("not cached"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_offline_errors_are_known_also_behind_others(error: BaseException) -> None:
    assert is_offline(error)
    assert is_offline(caused_by(error))
    assert not is_offline(caused_by(error, hidden=True))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        FileNotFoundError("w.pt"),
        urllib.error.HTTPError("http://localhost", 404, "Not Found", None, None),  # type: ignore[arg-type]
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_offline(error)
