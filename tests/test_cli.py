"""The command line: what it prints, what it writes, how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest

import crossget
from crossget import cli
from crossget.measure.doctor import Check, Diagnosis
from crossget.methods.schedules import Aligned, Ratio

TINY = "test_vit"
HOSTS = {"timm", "open_clip", "matplotlib", "transformers", "ray", "pyarrow"}
COMMANDS = ("demo", "show", "models", "flops", "bench", "doctor", "embed", "convert")


def call(*arguments: str) -> int:
    return cli.main(arguments)


def flat(text: str) -> str:
    """What is printed in a box, in one line."""
    return " ".join(text.replace("│", " ").split())


def raising(error: BaseException) -> Any:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


class TestHelp:
    @pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
    def test_the_tour_shows_every_command(self, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        assert call(*arguments) == 0
        tour = capsys.readouterr().out
        assert all(f"  crossget {command}" in tour for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            call(command, "--help")
        assert left.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: crossget {command}" in text
        assert "--traceback" in text
        assert ("--r R" in text) == (command not in ("models", "doctor"))

    def test_the_photographers_are_credited(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            call("demo", "--help")
        assert "Stefan van der Walt" in flat(capsys.readouterr().out)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("--version") == 0
        assert capsys.readouterr().out == f"crossget {crossget.__version__}\n"

    def test_imports_no_host(self) -> None:
        code = (
            f"import sys; from crossget.cli import main; main([]); sys.exit(', '.join({HOSTS} & set(sys.modules)) or 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        assert (done.returncode, done.stderr) == (0, "")


class TestErrors:
    def test_are_one_line_and_exit_code_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("flops", "vit_tiny_patch16") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("crossget: error: no model 'vit_tiny_patch16'")

    @pytest.mark.parametrize("content", [b"root:x:0:0:root:/root:/bin/sh\n", b"", b"PK\x03\x04", b"\x80\x02}q\x00."])
    def test_a_file_that_is_no_checkpoint(
        self, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "weights").write_bytes(content)
        out = str(tmp_path / "p.html")
        assert call("show", "--model", TINY, "--checkpoint", str(tmp_path / "weights"), "--out", out) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith(f"crossget: error: {tmp_path / 'weights'} ")
        assert not Path(out).exists()

    def test_a_photograph_is_not_overwritten(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        photo = tmp_path / "photo.png"
        photo.write_bytes(b"a photograph")
        for option in ("--out", "--png"):
            assert call("show", "--model", TINY, option, str(photo)) == 2
            assert f"{option} {photo}" in capsys.readouterr().err
        assert call("demo", TINY, "--out", str(photo)) == 2
        assert "crossget did not write it" in capsys.readouterr().err
        assert photo.read_bytes() == b"a photograph"

    def test_a_long_message_stays_one_line(self, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setattr("crossget.demo.backbones.make", raising(RuntimeError("several\n\tlines")))
        assert call("flops", TINY) == 2
        assert capsys.readouterr().err == "crossget: error: several lines\n"

    def test_the_traceback_on_demand(self) -> None:
        with pytest.raises(ValueError, match="no model 'nope'"):
            call("flops", "nope", "--traceback")

    def test_a_bug_is_not_dressed_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("crossget.demo.backbones.make", raising(KeyError("a bug")))
        with pytest.raises(KeyError):
            call("flops", TINY)

    @pytest.mark.parametrize(
        ("arguments", "value", "way_out"),
        [
            (("flops", TINY, "--r", "many"), "'many'", "(16)"),
            (("flops", TINY, "--r=-3"), "-3", "cannot be negative"),
            (("flops", TINY, "--r", "80%"), "0.8", "between 0 and 0.5"),
            (("bench", TINY, "--batch", "0"), "'0'", "from 1 up"),
            (("bench", TINY, "--device", "tape"), "'tape'", "cuda:1"),
            (("show", "--text", " ", "--pretrained", "none"), "--text", "'a cat'"),
            (("demo", "--out", "nowhere/a.png"), "nowhere", "folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_of_values_are_one_line(
        self, arguments: tuple[str, ...], value: str, way_out: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("crossget: error: ")
        assert value in line
        assert way_out in line

    @pytest.mark.parametrize(
        ("arguments", "value", "way_out"),
        [
            (("paint",), "paint", "doctor"),
            (("show", "--methods", "pitome"), "pitome", "crossget"),
            (("flops",), "MODEL", "crossget flops --help"),
            (("flops", TINY, "--rr", "3"), "--rr", "--r"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_of_arguments_say_what_there_is(
        self, arguments: tuple[str, ...], value: str, way_out: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as left:
            call(*arguments)
        assert left.value.code == 2
        message = flat(capsys.readouterr().err)
        assert value in message
        assert way_out in message

    def test_a_missing_gpu_is_told_before_any_work(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("crossget.demo.backbones.make", raising(AssertionError("a model is built")))
        assert call("bench", TINY, "--device", "cuda") == 2
        assert "no CUDA device" in capsys.readouterr().err

    def test_an_interrupt_is_exit_code_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("crossget.demo.backbones.make", raising(KeyboardInterrupt()))
        assert call("flops", TINY) == 130

    def test_a_reader_that_has_seen_enough_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        redirected: list[tuple[int, ...]] = []
        monkeypatch.setattr("crossget.demo.backbones.make", raising(BrokenPipeError()))
        monkeypatch.setattr(os, "dup2", lambda *numbers: redirected.append(numbers))
        monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
        assert call("flops", TINY) == 0
        assert redirected  # so that the interpreter's last flush does not complain either


@pytest.mark.parametrize(
    ("text", "r"),
    [
        ("16", 16),
        ("0", 0),
        ("8,4,0", (8, 4, 0)),
        ("10%", Ratio(0.1)),
        ("12.5%", Ratio(0.125)),
        ("16/8", Aligned(16, 8)),
        ("10%/16", Aligned(Ratio(0.1), 16)),
    ],
)
def test_what_r_may_be(text: str, r: object) -> None:
    assert cli.parse_reduction(text) == r


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = tmp_path / "d.png", tmp_path / "d.json"
    assert call("demo", TINY, "--r", "4", "--rounds", "0", "--out", str(out), "--json", str(numbers)) == 0
    captured = capsys.readouterr()
    for part in ("dense", "ToMe-style", "CrossGET", "tokens entering each block", "random weights"):
        assert part in captured.out
    told = captured.err.splitlines()
    assert told[0].endswith("HF_HUB_OFFLINE is set: random weights are used")
    assert told[1:] == [f"crossget: wrote {out}", f"crossget: wrote {numbers}"]
    assert out.stat().st_size > 10_000
    assert json.loads(numbers.read_text())["options"]["r"] == 4


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "p.html", tmp_path / "p.png"
    wanted = ("--model", TINY, "--r", "4", "--methods", "tome", "--pretrained", "none")
    assert call("show", "coffee", *wanted, "--out", str(page), "--png", str(picture)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tome: 101 to 77 tokens, 0.0")
    assert captured.err.splitlines() == [f"crossget: wrote {page}", f"crossget: wrote {picture}"]
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


class TestModels:
    def test_lists_what_can_be_reduced_and_why_the_others_cannot(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--host", "timm", "--filter", "test_[cv]*") == 0
        printed = capsys.readouterr().out
        assert "test_convnext" in printed
        assert "no: " in printed
        assert "can be reduced" in printed.splitlines()[-1]

    def test_supported_ones_alone_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--host", "timm", "--filter", "test_*", "--supported", "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert {row["name"] for row in rows} >= {"test_vit", "test_vit2", "test_vit3"}
        assert all(row["supported"] and row["towers"] for row in rows)

    def test_both_hosts(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--filter", "*medium_patch16_gap_256*", "--json") == 0
        assert {row["host"] for row in json.loads(capsys.readouterr().out)} == {"open_clip", "timm"}

    def test_a_pattern_without_a_match(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--filter", "zzz") == 2
        error = capsys.readouterr().err
        assert "'zzz'" in error
        assert "'*dino*'" in error

    @pytest.mark.slow
    @pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")
    def test_behind_the_connector(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--connector", "--filter", "LlavaForConditional*", "--json") == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["name"], row["supported"], row["towers"]) == ("llava", True, ["connector: images"])
        assert call("models", "--connector", "--filter", "blip") == 0
        printed = capsys.readouterr().out
        assert "has no connector: it has no get_image_features" in printed
        assert "0 of 1 can be reduced" in printed

    def test_connectors_are_of_transformers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("models", "--connector", "--host", "timm") == 2
        assert "--connector is for models of transformers, and --host is timm" in capsys.readouterr().err
        assert call("models", "--connector", "--filter", "zzz") == 2
        assert "matches no name" in capsys.readouterr().err

    def test_a_host_that_is_not_installed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("crossget.demo.backbones._import", lambda host: None)
        assert call("models", "--host", "timm") == 2
        assert 'timm is not installed: pip install "crossget[timm]"' in capsys.readouterr().err
        assert call("models") == 2
        assert 'pip install "crossget[open-clip,timm,transformers]"' in capsys.readouterr().err


class TestFlops:
    @pytest.mark.slow
    def test_counts_what_the_library_counts(self, capsys: pytest.CaptureFixture[str]) -> None:
        import timm
        import torch

        assert call("flops", TINY, "--r", "4", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        model = timm.create_model(TINY).eval()
        with crossget.attach(model, crossget.Ward(4)):
            expected = crossget.count_flops(model, torch.rand(1, 3, 160, 160))
        assert report["dense"]["total"] == expected.dense.total
        assert report["reduced"]["total"] == expected.total

    @pytest.mark.slow
    def test_a_clip_with_both_towers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("flops", "ViT-B-32", "--r", "2", "--text-r", "6", "--depth", "1") == 0
        printed = capsys.readouterr().out
        assert "visual: Ward(2" in printed
        assert "text: Ward(6" in printed

    def test_a_method_that_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("flops", TINY, "--r", "4", "--depth", "0", "--method", "crossget") == 0
        assert "visual: CrossGET(4" in capsys.readouterr().out

    def test_a_text_tower_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("flops", TINY, "--text-r", "2") == 2
        assert "--text-r is for a text tower" in capsys.readouterr().err

    @pytest.mark.slow
    @pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")
    def test_behind_the_connector(self, capsys: pytest.CaptureFixture[str]) -> None:
        given = ("--keep", "64", "--method", "tome", "--text-tokens", "8", "--json")
        assert call("flops", "llava-1.5-7b", *given) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["dense"]["image_tokens"], report["reduced"]["image_tokens"]) == (576, 64)
        assert report["reducers"].keys() == {"connector"}
        assert report["reducers"]["connector"].startswith("ToMe(Keep(64)")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((TINY, "--keep", "3"), "--keep is for a model that generates text from images, and test_vit is a tower"),
            ((TINY, "--tiles", "3"), "--tiles is for a model that generates"),
            ((TINY, "--keep", "1.5"), "keep is '1.5': expected a number of features that stay (64) or their share"),
            ((TINY, "--keep", "0"), "keep is '0'"),
            ((TINY, "--image", "30"), "image is '30': expected height and width in pixels, as in 1036x1036"),
            (("clip-vit-large-patch14-336", "--keep", "3"), "--keep is for a model that generates"),
            (("llava-1.5-7b", "--tiles", "3"), "takes images of one size, without tiles"),
            (("llava-1.5-7b", "--text-r", "3"), "--text-r is for a text tower"),
        ],
    )
    def test_options_without_an_effect(
        self, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call("flops", *arguments) == 2
        assert message in capsys.readouterr().err


class TestBench:
    @pytest.mark.slow
    def test_compares_with_dense(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("bench", TINY, "--r", "4", "--rounds", "1", "--batch", "1") == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("dense", "ToMe-style", "CrossGET", "speed"))

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("bench", TINY, "--r", "4", "--rounds", "1", "--batch", "1", "--json") == 0
        assert [m["name"] for m in json.loads(capsys.readouterr().out)["measurements"]] == [
            "dense",
            "Ward",
            "ToMe-style",
            "CrossGET",
        ]


class TestDoctor:
    def test_a_healthy_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("doctor", TINY) == 0
        assert "ok" in capsys.readouterr().out

    def test_a_failed_check_is_exit_code_1(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = Diagnosis("Net", (Check("does it work", False, "no"),))
        monkeypatch.setattr(crossget, "doctor", lambda model, inputs, reducer: bad)
        assert call("doctor", TINY) == 1
        assert "FAIL  does it work: no" in capsys.readouterr().out
