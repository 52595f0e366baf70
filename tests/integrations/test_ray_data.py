"""Embeddings of many images with Ray Data: what is refused at once, and whole runs on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from pictures import BROKEN, Killing, Prepare, jpeg, net, pixels

import crossget
from crossget import cli
from crossget.demo.embedding import EmbedOptions, make_encoder
from crossget.integrations import ray_data
from crossget.integrations.ray_data import Agreement, Encoder, Options, embed

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ray_data.PACKAGES if importlib.util.find_spec(name) is None]
# Where CROSSGET_REQUIRE names it, as in .ci/run, its tests run, and fail if it is not there.
REQUIRED = "ray" in os.environ.get("CROSSGET_REQUIRE", "").split(",")
with_arrow = pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason='pip install "crossget[ray]"')


class TestWithoutRay:
    def test_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert cli.main(["embed", "photos", "out", "--model", "no such model", "--r", "2"]) == 2
        expected = 'crossget: error: embedding with Ray Data needs ray, pyarrow, pandas: pip install "crossget[ray]"\n'
        assert capsys.readouterr().err == expected

    @pytest.mark.parametrize("name", ["actors", "batch", "shard_rows", "sample"])
    def test_numbers_that_make_no_sense(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is -1: expected [01] or more"):
            Options(**{name: -1})

    def test_how_much_is_removed_is_said_once(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Give --r, or --saved"):
            EmbedOptions("photos", "out", "ViT-B-16")
        with pytest.raises(ValueError, match="leave out --method and --r"):
            EmbedOptions("photos", "out", "ViT-B-16", saved=tmp_path, method="ward")

    def test_random_weights_are_used_on_request_only(self) -> None:
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: give --checkpoint"):
            make_encoder(EmbedOptions("photos", "out", "test_vit", r=4))

    def test_actors_leave_room_for_reading(self) -> None:
        count = ray_data._actors
        assert count(Options(), {"CPU": 8}) == 6
        assert count(Options(device="cuda"), {"CPU": 8, "GPU": 4}) == 4
        assert count(Options(actors=1), {"CPU": 3}) == 1
        for options, resources in ((Options(actors=2), {"CPU": 3}), (Options(), {"CPU": 2})):
            with pytest.raises(RuntimeError, match="CPUs and 0 GPUs, and [12] actors on cpu need one CPU each, and 2"):
                count(options, resources)
        with pytest.raises(RuntimeError, match="need one GPU and one CPU each"):
            count(Options(device="cuda"), {"CPU": 8})

    def test_agreement(self) -> None:
        dense = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        assert Agreement.of(dense, 3 * dense) == Agreement(3, pytest.approx(1), pytest.approx(1), 1.0)
        other = torch.tensor([[1.0, 0.0], [0.1, 0.9], [0.0, 1.0]])
        found = Agreement.of(dense, other)
        assert found.neighbours == pytest.approx(2 / 3)  # that of the second picture is another one
        assert found.least == pytest.approx(float(torch.cosine_similarity(dense[1], other[1], dim=0)))

    def test_the_identity_tells_models_apart(self) -> None:
        def encoder(reducer: Any) -> Encoder:
            return Encoder(net(reducer), pixels)

        first = encoder(crossget.Ward(2))
        assert first.identity() == encoder(crossget.Ward(2)).identity()
        assert first.identity()["method"] != encoder(crossget.Ward(3)).identity()["method"]
        other = encoder(crossget.Ward(2))
        with torch.no_grad():
            other.model.patches.bias[3] += 1  # type: ignore[union-attr, index]
        assert first.identity()["weights"] != other.identity()["weights"]
        trained = encoder(crossget.CrossGET(2))
        with torch.no_grad():
            crossget.attachment(trained.model).cross_tokens["visual"][0, 0] += 1
        assert trained.identity()["weights"] != encoder(crossget.CrossGET(2)).identity()["weights"]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(net(crossget.Ward(2)), Prepare(tmp_path / "log"))


def calls(encoder: Any) -> int:
    """How many pictures Ray's processes have decoded since the last time."""
    log: Path = encoder.prepare.log
    log.touch()
    count = log.stat().st_size
    log.write_bytes(b"")
    return count


def written(out: Path) -> dict[Any, tuple[Any, Any]]:
    """By id, the embedding and the error; no id is there twice."""
    from pyarrow import parquet

    table = parquet.read_table(out)  # as users do: the folder itself
    first = table.column_names[0]
    assert table.column_names == [first, "embedding", "error"]
    rows = table.to_pylist()
    found = {row[first]: (row["embedding"], row["error"]) for row in rows}
    assert len(found) == len(rows)
    assert not list(out.rglob("*.part")) + list(out.rglob("_parts"))
    return found


def same(found: list[list[float]], encoder: Encoder, contents: list[bytes]) -> None:
    expected = encoder.embed(torch.stack([pixels(content) for content in contents]))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


@with_arrow
@pytest.mark.slow
class TestRefusedBeforeRayStarts:
    @pytest.fixture(autouse=True)
    def no_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: object, **__: object) -> None:
            raise AssertionError("Ray is started")

        monkeypatch.setattr("ray.init", start)

    def test_input(self, tmp_path: Path, encoder: Encoder) -> None:
        def refused(message: str, **options: Any) -> None:
            with pytest.raises(ValueError, match=message):
                embed(tmp_path / "in", tmp_path / "out", encoder, Options(**options))

        refused("there is no file or folder .*in")
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "notes.txt").touch()
        refused("in: nothing to embed; looked for .parquet, .tar, .jpg")
        (tmp_path / "in" / "a.jpg").write_bytes(BROKEN)
        refused("none of 1 pictures can be read; the first one: cannot identify image file")
        refused("an id column is of Parquet files", id_column="number")
        pictures.write_shard(tmp_path / "in" / "0.tar", [])
        refused("files of several kinds, images, webdataset: give a folder of one kind")
        (tmp_path / "in" / "a.jpg").unlink()
        refused("its files have no images")
        (tmp_path / "in" / "0.tar").unlink()
        pictures.write_parquet(tmp_path / "in" / "0.parquet", [jpeg(0), jpeg(1)])
        refused("name the column whose values tell their rows apart")
        refused("0.parquet has no column 'image', only number, photo, more", id_column="number")
        refused("the column 'more' has nulls or a value twice", id_column="more", image_column="photo")
        (tmp_path / "in" / "1.parquet").write_bytes(BROKEN)
        refused("1.parquet is not a Parquet file, or is truncated", id_column="number", image_column="photo")
        assert not (tmp_path / "out").exists()

    def test_output(self, tmp_path: Path, encoder: Encoder) -> None:
        pictures.write_folder(tmp_path / "in", [jpeg(0)])
        with pytest.raises(ValueError, match="where it would be read as well"):
            embed(tmp_path / "in", tmp_path / "in" / "out", encoder)
        out = tmp_path / "out"
        out.touch()
        with pytest.raises(ValueError, match="out is a file: give a new folder"):
            embed(tmp_path / "in", out, encoder)
        out.unlink()
        out.mkdir()
        (out / "thesis.tex").touch()
        with pytest.raises(ValueError, match="has files, and crossget did not write them"):
            embed(tmp_path / "in", out, encoder)
        (out / "thesis.tex").unlink()
        with pytest.raises(AssertionError, match="Ray is started"):
            embed(tmp_path / "in", out, encoder)
        other = Encoder(net(crossget.Ward(3)), encoder.prepare)
        with pytest.raises(ValueError, match=r"other settings: method was visual: Ward\(2.*, and is visual: Ward\(3"):
            embed(tmp_path / "in", out, other)
        pictures.write_folder(tmp_path / "in too", [jpeg(0)])
        with pytest.raises(ValueError, match="other settings: images was .*in, and is .*in too"):
            embed(tmp_path / "in too", out, encoder)

    def test_models(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder) -> None:
        pictures.write_folder(tmp_path / "in", [jpeg(0)])
        given = ("embed", str(tmp_path / "in"), str(tmp_path / "out"), "--r", "2", "--model")
        for model, message in (("ViT-B-61", "did you mean ViT-B-16"), (str(tmp_path), "without config.json")):
            assert cli.main([*given, model]) == 2
            assert message in capsys.readouterr().err
        flat = Encoder(encoder.model, encoder.prepare, lambda model, images: model(images)[0])
        with pytest.raises(ValueError, match=r"the encoder returns \(32,\) for one picture: expected \[1, C\]"):
            embed(tmp_path / "in", tmp_path / "out", flat)
        assert not (tmp_path / "out").exists()


# Ray's processes import the helpers by name.
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on this machine, for all runs in this process."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
        yield ray
        ray.shutdown()


@with_arrow
@pytest.mark.slow
class TestRuns:
    def test_two_actors_of_which_one_is_killed(self, ray: Any, tmp_path: Path, encoder: Encoder) -> None:
        """2,000 pictures, 20 of them broken; the same command again does nothing."""
        contents = [BROKEN if number % 100 == 7 else jpeg(number) for number in range(2000)]
        pictures.write_folder(tmp_path / "in", contents)
        (tmp_path / "processes").mkdir()
        (tmp_path / "once").touch()
        killed = Encoder(encoder.model, encoder.prepare, Killing(tmp_path / "processes"))
        options = Options(actors=2, shard_rows=200, sample=64)
        report = embed(tmp_path / "in", tmp_path / "out", killed, options)
        assert (tmp_path / "done").exists()
        assert len(list((tmp_path / "processes").iterdir())) > 2
        assert (report.rows, report.failed, report.added) == (2000, 20, 2000)
        names = {str(tmp_path / "in" / str(n % 3) / f"{n:04}.jpg"): content for n, content in enumerate(contents)}
        sample = [names[sorted(names)[i * 2000 // 64]] for i in range(64)]
        images = torch.stack([pixels(content) for content in sample if content != BROKEN])
        with crossget.attachment(encoder.model).paused():
            dense = encoder.embed(images)
        expected = Agreement.of(dense, encoder.embed(images))
        assert vars(report.agreement) == pytest.approx(vars(expected), abs=1e-4)
        assert expected.cosine < 0.9999
        assert "2,000 pictures, of which 20 could not be read" in str(report)
        found = written(tmp_path / "out")
        assert found.keys() == names.keys()
        assert all((error is None) == (vector is not None) for vector, error in found.values())
        assert {name for name, (_, error) in found.items() if error} == {n for n in names if names[n] == BROKEN}
        good = [name for name in names if names[name] != BROKEN]
        same([found[name][0] for name in good], encoder, [names[name] for name in good])
        assert len(list((tmp_path / "out" / "shards").glob("*.parquet"))) > 2
        calls(encoder)
        again = embed(tmp_path / "in", tmp_path / "out", killed, options)
        assert (again.rows, again.failed, again.added, again.agreement) == (2000, 20, 0, report.agreement)
        assert calls(encoder) == 0
        assert written(tmp_path / "out") == found

    @pytest.mark.parametrize("kind", ["parquet", "webdataset"])
    def test_what_is_new_is_added(self, kind: str, ray: Any, tmp_path: Path, encoder: Encoder) -> None:
        contents = [jpeg(number) for number in range(50)]
        contents[3] = BROKEN
        options = Options(actors=1, batch=8, shard_rows=10, sample=0)
        if kind == "parquet":
            options = Options(**{**vars(options), "id_column": "number", "image_column": "photo"})
            pictures.write_parquet(tmp_path / "in" / "0.parquet", contents[:40])
        else:
            pictures.write_shard(tmp_path / "in" / "0.tar", contents[:40])
        assert embed(tmp_path / "in", tmp_path / "out", encoder, options).added == 40
        calls(encoder)
        if kind == "parquet":
            pictures.write_parquet(tmp_path / "in" / "1.parquet", contents[40:], 40)
        else:
            pictures.write_shard(tmp_path / "in" / "1.tar", contents[40:], 40)
            whole = (tmp_path / "in" / "1.tar").read_bytes()
            (tmp_path / "in" / "2.tar").write_bytes(whole[:700])  # breaks off within the first picture
        report = embed(tmp_path / "in", tmp_path / "out", encoder, options)
        broken_off = 1 if kind == "webdataset" else 0
        assert (report.added, report.rows, report.failed) == (10 + broken_off, 50 + broken_off, 1 + broken_off)
        assert calls(encoder) == 10
        found = written(tmp_path / "out")
        rows = [found.pop(n if kind == "parquet" else f"{tmp_path}/in/{n // 40}.tar/{n:04}.jpg") for n in range(50)]
        assert [n for n, (_, error) in enumerate(rows) if error] == [3]
        same([vector for vector, error in rows if not error], encoder, contents[:3] + contents[4:])
        assert [(key, error) for key, (_, error) in found.items()] == [
            (f"{tmp_path}/in/2.tar: unexpected end of data", "it has no bytes")
        ] * broken_off

    def test_a_killed_run_goes_on(self, ray: Any, tmp_path: Path) -> None:
        contents = [jpeg(number) for number in range(200)]
        for shard in range(4):
            pictures.write_shard(tmp_path / "in" / f"{shard}.tar", contents[50 * shard : 50 * shard + 50], 50 * shard)
        out, log = tmp_path / "out", tmp_path / "log"
        run = [sys.executable, "-m", "pictures", str(tmp_path / "in"), str(out), str(log)]
        done = subprocess.run(
            run, cwd=ROOT, env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        from pyarrow import parquet

        before = parquet.read_table(pictures.committed(out)).num_rows
        assert 0 < before < 200
        encoder = Encoder(net(crossget.Ward(2)), Prepare(log))
        calls(encoder)
        report = embed(tmp_path / "in", out, encoder, Options(actors=1, batch=8, shard_rows=10, sample=0))
        assert (report.rows, report.added, report.failed) == (200, 200 - before, 0)
        assert calls(encoder) == 200 - before
        found = written(out)
        same([found[f"{tmp_path}/in/{n // 50}.tar/{n:04}.jpg"][0] for n in range(200)], encoder, contents)

    def test_a_model_that_fails_stops_the_run(self, ray: Any, tmp_path: Path, encoder: Encoder) -> None:
        pictures.write_folder(tmp_path / "in", [jpeg(number) for number in range(20)])
        bad = Encoder(encoder.model, encoder.prepare, pictures.failing)
        with pytest.raises(
            RuntimeError, match="the run stopped, and goes on when it is started again: RuntimeError: out of luck$"
        ):
            embed(tmp_path / "in", tmp_path / "out", bad, Options(actors=1))
        report = embed(tmp_path / "in", tmp_path / "out", encoder, Options(actors=1, sample=0))
        assert (report.rows, report.added) == (20, 20)

    def test_the_command_on_a_cluster_with_a_model_of_transformers(self, ray: Any, tmp_path: Path) -> None:
        """From another process, which connects to it by its address."""
        import numpy as np
        from PIL import Image
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=CLIPTextConfig(**sizes, vocab_size=50).to_dict(),
            vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8).to_dict(), projection_dim=16,
        )  # fmt: skip
        model = CLIPModel(config).eval()
        model.save_pretrained(tmp_path / "clip")
        size = {"height": 32, "width": 32}
        processor = CLIPImageProcessor(size=size, crop_size=size)
        processor.save_pretrained(tmp_path / "clip")
        contents = [jpeg(number) for number in range(12)]
        pictures.write_parquet(tmp_path / "in" / "0.parquet", contents, struct=True)
        crossget.attach(model, crossget.CrossGET(2)).save(tmp_path / "saved")
        command = [
            sys.executable, "-c", "import sys; from crossget.cli import main; sys.exit(main())",
            "embed", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(tmp_path / "clip"),
            "--saved", str(tmp_path / "saved"), "--id", "number", "--image", "photo", "--actors", "1",
            "--address", ray.get_runtime_context().gcs_address,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "12 pictures, of which 0 could not be read" in done.stdout
        assert "dense and reduced embeddings of 12 pictures: cosine 0." in done.stdout
        settings = json.loads((tmp_path / "out" / "_settings.json").read_text())
        assert settings["method"].startswith("visual: CrossGET(2")
        images = [Image.open(pictures.io.BytesIO(content)) for content in contents]
        given = processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out: Any = model.get_image_features(pixel_values=given)
        expected = getattr(out, "pooler_output", out)
        found = written(tmp_path / "out")
        np.testing.assert_allclose([found[n][0] for n in range(12)], expected, rtol=1e-4, atol=1e-5)
