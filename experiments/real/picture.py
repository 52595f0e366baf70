"""Draw photographs with their saliency maps, dense and reduced: `python -m experiments.real.picture --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crossget
from crossget.core.files import replacing
from experiments.lib.data import read_image
from experiments.real.presets import fit
from experiments.real.report import PICTURE
from experiments.real.saliency import ROWS, agreement, load_backbone, load_decoder, maps_of, square


@dataclass(frozen=True)
class Options:
    """What to draw."""

    photographs: tuple[Path, ...]
    """Files; each is a row of the picture."""
    backbone: Path
    """Safetensors file with the parameters of a transformers Dinov2Model."""
    decoder: Path
    """Safetensors file with the parameters of the decoder."""
    config: Path | None = None
    """JSON file with what of the Dinov2Config differs from a ViT-S/14 for 518 pixels."""
    presets: tuple[str, ...] = tuple(ROWS)
    """Methods; each is a column."""
    budget: int = 50
    """Multiply-adds of the backbone, in % of the dense one's."""
    out: Path = Path(__file__).parent / PICTURE
    """The picture."""


def main(options: Options) -> None:
    """Compute the maps, and draw them."""
    from matplotlib.figure import Figure

    setting = square()
    backbone = load_backbone(options.backbone, options.config)
    decoder = load_decoder(options.decoder, backbone)
    pixels = torch.stack([read_image(file, setting.transform()) for file in options.photographs])
    dense = maps_of(backbone, decoder, pixels, len(pixels), "cpu")
    columns: list[tuple[str, Any]] = [("dense", dense)]
    for row in (ROWS[name] for name in options.presets):
        with crossget.attach(backbone, fit(backbone, pixels[:1], row, options.budget)):
            maps = maps_of(backbone, decoder, pixels, len(pixels), "cpu")
        columns.append((f"{row.label}\nIoU {agreement(maps, dense)['iou']:.0f} %", maps))
    mean, std = (torch.tensor(values)[:, None, None] for values in (setting.mean, setting.std))
    figure = Figure(figsize=(2 * (len(columns) + 1), 2 * len(pixels) + 0.5), layout="constrained")
    grid = figure.subplots(len(pixels), len(columns) + 1, squeeze=False)
    for i, axes in enumerate(grid):
        axes[0].imshow((pixels[i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        for panel, (title, maps) in zip(axes[1:], columns, strict=True):
            panel.imshow(maps[i].numpy(), vmin=0, vmax=1, cmap="gray")
            panel.set_title(title if i == 0 else "", fontsize=8)
        for panel in axes:
            panel.set_axis_off()
    grid[0][0].set_title(f"{options.budget} % of the FLOPs", fontsize=8)
    with replacing(options.out) as part:
        figure.savefig(part, format="png", dpi=100)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
