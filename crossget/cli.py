"""The command line. Every command is one function below; what it computes lives elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

TOUR = """\
CrossGET, Ward and ToMe-style token reduction for backbones of timm, open_clip and transformers, by name. A tour:

  crossget demo                            Ward, ToMe-style and CrossGET beside the dense model, and a picture
  crossget show photo.jpg                  a web page: which patches become one token, block by block
  crossget models --filter '*dino*'        which backbones can be reduced, and why the others cannot
  crossget flops ViT-B-16 --r 16           multiply-adds by module, dense and reduced; no memory, no weights
  crossget flops llava-1.5-7b --r 13       the same for generating: image tower, prefill, decoding step, cache
  crossget bench vit_base_patch16_224      speed as a ratio to dense, measured on this machine
  crossget doctor vit_base_patch16_224     does it attach exactly, take effect, and come off without a trace?
  crossget convert FOLDER OUT              the authors' LLaVA checkpoint, for transformers and crossget.load

In Python: crossget.attach(model, crossget.CrossGET(r=16)).
"""

MODEL_HELP = "a name of open_clip or timm; if both have it, host:name"
R_HELP = "tokens to remove in each block: a number (16), one per block (16,16,8,...), or a share of what enters (10%%)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process if None.

    Returns:
        The exit code: 0, 1 where a check failed, 2 where what was asked for cannot be done.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.command(options))
    except BrokenPipeError:  # `crossget models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        print(f"crossget: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def demo(options: argparse.Namespace) -> int:
    """Dense, Ward, ToMe-style and CrossGET side by side on photographs: a table, and a picture of what was merged."""
    from crossget.demo.compare import Options, run

    names = [f.name for f in dataclasses.fields(Options)]
    found = run(Options(**{name: getattr(options, name) for name in names}), say=_say)
    print(found.table())
    for path in (options.out, options.json):
        if path is not None:
            _say(f"wrote {path}")
    return 0


def show(options: argparse.Namespace) -> int:
    """One photograph, block by block, as a web page in one file: which patches become one token, and what it costs."""
    from crossget.demo.viewer import Options, run

    names = [f.name for f in dataclasses.fields(Options)]
    story = run(Options(**{name: getattr(options, name) for name in names}), say=_say)
    for name, runs in story.runs.items():
        tokens, gflops = runs[0].tokens, runs[0].count.total / 1e9
        dense = story.dense.count.total / 1e9
        print(f"{name}: {tokens[0]} to {tokens[-1]} tokens, {gflops:.3g} of {dense:.3g} GFLOPs")
    for path in (options.out, options.png):
        if path is not None:
            _say(f"wrote {path}")
    return 0


def models(options: argparse.Namespace) -> int:
    """Which backbones can be reduced, and why the others cannot."""
    rows = []
    for host in [options.host] if options.host else _installed():
        rows += [{"host": host, **dataclasses.asdict(row)} for row in _matrix(host, options.filter)]
    if options.filter and not rows:
        raise ValueError(f"--filter {options.filter!r} matches no name: it stands for whole names, as '*dino*' does")
    shown = [row for row in rows if row["supported"] or not options.supported]
    if options.json:
        print(json.dumps(shown, indent=2))
        return 0
    body = [[row["host"], row["name"], row["architecture"], _verdict(row)] for row in shown]
    print(tabulate(body, ["host", "name", "class", "towers, or why not"]))
    print(f"\n{sum(row['supported'] for row in rows)} of {len(rows)} can be reduced")
    return 0


def flops(options: argparse.Namespace) -> int:
    """Multiply-adds by module, dense and reduced, counted on the meta device."""
    import crossget
    from crossget.checkpoints.hf_sizes import PRESETS
    from crossget.demo.backbones import make
    from crossget.demo.compare import schedules

    if options.model in PRESETS:
        return _flops_of_preset(options)
    backbone = make(options.model, device="meta")
    reducers = {tower: crossget.CrossGET(r) for tower, r in schedules(backbone, options.r, options.text_r).items()}
    with crossget.attach(backbone.model, reducers):
        report = crossget.count_flops(backbone.model, backbone.made_up(options.batch, text=backbone.reads_text))
    print(report.to_json() if options.json else report.table(options.depth))
    return 0


def _flops_of_preset(options: argparse.Namespace) -> int:
    """A model of transformers: by stages if it generates, otherwise one forward."""
    import torch

    import crossget
    from crossget.checkpoints.hf_sizes import build
    from crossget.measure.generation import count_stages, has_stages

    model: Any = build(options.model)
    if has_stages(model):
        with crossget.attach(model, crossget.CrossGET(options.r)):
            stages = count_stages(model, options.text_tokens, options.batch)
        print(stages.to_json() if options.json else stages.table())
        return 0
    text, vision = model.config.text_config, model.config.vision_config
    ids = torch.zeros(options.batch, text.max_position_embeddings, dtype=torch.long, device="meta")
    pixels = torch.empty(options.batch, 3, vision.image_size, vision.image_size, device="meta")
    wanted = {"visual": options.r, **({"text": options.text_r} if options.text_r != 0 else {})}
    with crossget.attach(model, {tower: crossget.CrossGET(r) for tower, r in wanted.items()}):
        report = crossget.count_flops(model, {"input_ids": ids, "pixel_values": pixels})
    print(report.to_json() if options.json else report.table(options.depth))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Speed of dense, Ward (at ToMe-style's cost), ToMe-style and CrossGET on made-up inputs and random weights."""
    from crossget.demo.backbones import make
    from crossget.demo.compare import TEXT, measure, reducers, schedules

    backbone = make(options.model, pretrained="none", device=options.device)
    wanted = schedules(backbone, options.r, options.text_r)
    one = backbone.made_up(1, text=TEXT in wanted)
    inputs = backbone.made_up(options.batch, text=TEXT in wanted)
    report = measure(backbone.model, inputs, reducers(backbone, wanted, one, _say), options.rounds)
    print(report.to_json() if options.json else report.table())
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check on one backbone that attaching is exact, takes effect and leaves no trace."""
    import crossget
    from crossget.demo.backbones import make

    backbone = make(options.model, pretrained="none", device=options.device)
    diagnosis = crossget.doctor(backbone.model, backbone.made_up(2, text=backbone.reads_text))
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def convert(options: argparse.Namespace) -> int:
    """The authors' LLaVA checkpoint as a folder for transformers, with crossget's own file beside it."""
    from crossget.checkpoints.convert import DTYPES
    from crossget.checkpoints.convert import convert as run

    print(
        run(
            options.folder, options.out, r=options.r, vision_tower=options.vision_tower,
            max_shard_size=options.max_shard_size, dtype=DTYPES.get(options.dtype),
            cross_tokens=not options.no_cross_tokens, overwrite=options.overwrite,
        )
    )  # fmt: skip
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share


def _installed() -> list[str]:
    from crossget.demo.backbones import PACKAGES, installed

    found = [host for host in PACKAGES if installed(host)]
    if not found:
        *some, last = PACKAGES
        extras = ",".join(PACKAGES.values())
        raise RuntimeError(f'neither {", ".join(some)} nor {last} is installed: pip install "crossget[{extras}]"')
    return found


def _matrix(host: str, pattern: str | None) -> Iterator[Any]:
    """The rows of a host's support matrix whose names match."""
    from crossget.demo.backbones import PACKAGES, installed

    if not installed(host):
        raise RuntimeError(f'{host} is not installed: pip install "crossget[{PACKAGES[host]}]"')
    rows = importlib.import_module(f"crossget.integrations.{host}").support_matrix(pattern)
    yield from tqdm(rows, desc=f"building the models of {host}", disable=None, leave=False, unit=" models")


def _verdict(row: dict[str, Any]) -> str:
    return "; ".join(row["towers"]) if row["supported"] else f"no: {row['reason']}"


def _say(line: str) -> None:
    """A line for the user beside the output proper."""
    tqdm.write(f"crossget: {line}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def _parser() -> argparse.ArgumentParser:
    import crossget

    parser = argparse.ArgumentParser("crossget", description=TOUR, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"crossget {crossget.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(
        metavar="COMMAND", help="demo, show, models, flops, bench, doctor or convert; each has a --help"
    )
    _add_demo(commands)
    _add_show(commands)
    _add_models(commands)
    _add_flops(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_convert(commands)
    return parser


def _add(commands: Any, command: Callable[[argparse.Namespace], int], epilog: str = "") -> argparse.ArgumentParser:
    summary = (command.__doc__ or "").strip()
    one: argparse.ArgumentParser = commands.add_parser(
        command.__name__, description=summary, epilog=epilog, formatter_class=_Formatter
    )
    one.set_defaults(command=command)
    one.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return one


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, and epilogs as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" tell nobody anything.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _add_demo(commands: Any) -> None:
    from crossget.demo.compare import SHIPPED, Options

    credits = "\n".join(f"  {name:<14} {credit}" for name, _, credit in SHIPPED)
    one = _add(commands, demo, f"Without --images, the photographs are those in scikit-image's package:\n{credits}")
    one.add_argument("model", nargs="?", default=Options.model, help=MODEL_HELP)
    _add_r(one)
    _add_weights(one)
    one.add_argument("--images", type=Path, metavar="FOLDER", help="photographs of your own")
    _add_speed(one)
    one.add_argument("--out", type=Path, default=Options.out, metavar="FILE", help="where the picture goes")
    one.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")


SHOW_EPILOG = """\
The page needs nothing but a browser: no network, no other file. With a CLIP of open_clip, --text shows how near each
token is to each text, and lets a text guide crossget and topk, which then keep the tokens near to it.

  crossget show cat.jpg --model ViT-B-16 --r 12 --text "a cat" "a cup" --out cat.html
"""


def _add_show(commands: Any) -> None:
    from crossget.demo.compare import SHIPPED
    from crossget.demo.viewer import METHODS, Options

    one = _add(commands, show, SHOW_EPILOG)
    shipped = ", ".join(Path(name).stem for name, _, _ in SHIPPED)
    help_text = f"a file, or one of scikit-image's photographs: {shipped}; if not given, the first of these"
    one.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help=help_text)
    one.add_argument("--model", default=Options.model, help=MODEL_HELP)
    one.add_argument("--r", type=_reduction, default="16", help=R_HELP)
    one.add_argument(
        "--methods", nargs="+", default=Options.methods, choices=METHODS, help="to stand side by side", metavar="METHOD"
    )
    one.add_argument("--text", nargs="+", default=(), metavar="TEXT", help="what to look for in the photograph")
    _add_weights(one)
    one.add_argument("--device", type=_device, default="cpu", help="where the model runs")
    one.add_argument("--out", type=Path, default=Options.out, metavar="FILE", help="where the page goes")
    one.add_argument("--png", type=Path, metavar="FILE", help="the same as a picture for papers")


def _add_models(commands: Any) -> None:
    one = _add(
        commands, models, "Every model is built, without memory: seconds for a pattern, minutes for all of them."
    )
    one.add_argument("--host", choices=["timm", "open_clip", "transformers"], help="only this one")
    one.add_argument("--filter", metavar="PATTERN", help="only names like this, * being anything; quote it")
    one.add_argument("--supported", action="store_true", help="leave out those that cannot be reduced")
    _add_json(one)


def _add_flops(commands: Any) -> None:
    from crossget.checkpoints.hf_sizes import PRESETS

    epilog = f"""\
A multiply-add is one. Nothing is downloaded or computed, so any size will do.
Beside the names of open_clip and timm, these models of transformers are known:
  {", ".join(PRESETS)}"""
    one = _add(commands, flops, epilog)
    _add_model(one)
    _add_r(one)
    one.add_argument("--batch", type=_positive, default=1, help="images, and texts")
    help_text = "tokens of text in the prompt of a model that generates"
    one.add_argument("--text-tokens", type=_positive, default=64, metavar="N", help=help_text)
    one.add_argument("--depth", type=int, default=2, help="levels of modules to list; 0 is the total alone")
    _add_json(one)


def _add_bench(commands: Any) -> None:
    one = _add(commands, bench)
    _add_model(one)
    _add_r(one)
    _add_speed(one)
    _add_json(one)


def _add_doctor(commands: Any) -> None:
    one = _add(commands, doctor, "The exit code is 1 if a check fails.")
    _add_model(one)
    one.add_argument("--device", type=_device, default="cpu", help="where the model runs")


CONVERT_EPILOG = """\
FOLDER is what the authors publish: config.json, pytorch_model-*.bin or safetensors, and cross_tokens.bin (or the cross
tokens among the weights). LoRA has to be merged first. Without a tokenizer in it, the processor is left out.

  model = transformers.LlavaForConditionalGeneration.from_pretrained("OUT")
  processor = transformers.AutoProcessor.from_pretrained("OUT")
  crossget.load(model, "OUT")
"""


def _add_convert(commands: Any) -> None:
    from crossget.checkpoints.convert import DTYPES

    one = _add(commands, convert, CONVERT_EPILOG)
    one.add_argument("folder", type=Path, metavar="FOLDER", help="in LLaVA's original layout")
    one.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    one.add_argument("--r", type=_reduction, default="13", help=f"of the vision tower; {R_HELP}")
    help_text = "a CLIP in transformers' layout, or its id on the hub; if not given, what FOLDER's config.json names"
    one.add_argument("--vision-tower", metavar="FOLDER", help=help_text)
    help_text = "of one file of weights, such as 500MB or 4GiB"
    one.add_argument("--max-shard-size", type=_size, default="4GB", metavar="SIZE", help=help_text)
    one.add_argument("--dtype", choices=["keep", *DTYPES], default="keep", help="of the new weights")
    help_text = "convert the dense LLaVA alone, whether FOLDER has cross tokens or not"
    one.add_argument("--no-cross-tokens", action="store_true", help=help_text)
    one.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion left in OUT")


def _add_model(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def _add_weights(one: argparse.ArgumentParser) -> None:
    from crossget.demo.compare import Options

    one.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of your own: a safetensors or torch file")
    help_text = "weights of the host; 'default' tries the host's preferred ones, 'none' is random"
    one.add_argument("--pretrained", default=Options.pretrained, metavar="TAG", help=help_text)
    one.add_argument("--seed", type=int, default=Options.seed, help="of random weights")


def _add_r(one: argparse.ArgumentParser) -> None:
    one.add_argument("--r", type=_reduction, default="16", help=R_HELP)
    one.add_argument(
        "--text-r", type=_reduction, default="0", metavar="R", help="the same for texts; 0 leaves them alone"
    )


def _add_speed(one: argparse.ArgumentParser) -> None:
    one.add_argument("--batch", type=_positive, default=8, help="images per call, for the speed")
    one.add_argument(
        "--rounds", type=int, metavar="N", help="turns in the measurement; if not given, about half a minute"
    )
    one.add_argument("--device", type=_device, default="cpu", help="where the model runs")


def _add_json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="for programs instead of for people")


def _reduction(text: str) -> Any:
    """What may stand behind --r."""
    from crossget.methods.schedules import Ratio, as_schedule

    try:
        if text.endswith("%"):
            return Ratio(float(text[:-1]) / 100)
        numbers = [int(part) for part in text.split(",")]
        r = numbers[0] if len(numbers) == 1 else tuple(numbers)
        as_schedule(r)
    except ValueError as error:
        reason = "" if "invalid literal" in str(error) or "could not convert" in str(error) else f" ({error})"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {R_HELP.replace('%%', '%')}{reason}") from None
    return r


def _size(text: str) -> int:
    from crossget.checkpoints.convert import size_of

    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 up")
    return int(text)


def _device(text: str) -> str:
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch: expected cpu, cuda, cuda:1 or mps") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: torch finds no CUDA device on this machine")
    return text
