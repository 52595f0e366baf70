"""CoOp's eleven sets in CoOp's layout, any set as folders of images, and CoOp's few-shot sampler."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.lib.data import BadData

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Photo:
    """One photograph and its class."""

    file: Path
    label: int


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        names: of the classes, by label.
        splits: the photographs of "train", "val" and "test", in the order of the files they are listed in.
        template: what CoOp says of a class where nothing is learnt.
    """

    names: tuple[str, ...]
    splits: Mapping[str, Sequence[Photo]]
    template: str


@dataclass(frozen=True)
class Source:
    """How CoOp lays a data set out, inside the folder that holds all of them.

    Attributes:
        title: its name in CoOp.
        folder: of the set.
        images: what the split file's paths are relative to, inside `folder`.
        template: CoOp's hand-written prompt.
        listing: which files say what is in which split: CoOp's own (`split_zhou_*.json`), or those of the set.
        renamed: classes whose folders are called otherwise.
    """

    title: str
    folder: str
    images: str
    template: str = "a photo of a {}."
    listing: Callable[["Source", Path], Data] = field(default=lambda source, root: _from_json(source, root))
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def split_file(self) -> str:
        """CoOp's name for its own split."""
        return f"split_zhou_{self.title}.json"


# What is listed where ------------------------------------------------------------------------------------------------


def _from_json(source: Source, root: Path) -> Data:
    """`{"train": [[path, label, class], ..], "val": .., "test": ..}`."""
    file = root / source.split_file
    content = json.loads(
        _text(file, f"CoOp's split of {source.title}: experiments/coop/README.md says where to get it")
    )
    try:
        entries = {
            split: [(str(a), int(b), str(c)) for a, b, c in content[split]] for split in ("train", "val", "test")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file} is not a split of CoOp\'s, {{"train": [[path, label, class], ..], "val": .., "test": ..}}: '
            f"{error!r}"
        ) from None
    splits = {
        split: [Photo(root / source.images / path, label) for path, label, _ in some] for split, some in entries.items()
    }
    names = _names(((label, name) for some in entries.values() for _, label, name in some), file)
    return Data(names, splits, source.template)


def _from_variants(source: Source, root: Path) -> Data:
    """FGVC-Aircraft's own lists: variants.txt has the classes, images_variant_*.txt lines such as `0034309 707-320`."""
    names = [line.strip() for line in _text(root / "variants.txt", "FGVC-Aircraft's list of variants").splitlines()]
    labels = {name: label for label, name in enumerate(names)}
    splits = {}
    for split in ("train", "val", "test"):
        file, photos = root / f"images_variant_{split}.txt", []
        for line in _text(file, "FGVC-Aircraft's list").splitlines():
            stem, _, name = line.strip().partition(" ")
            if name not in labels:
                raise ValueError(f"{file}: {line.strip()!r} is none of the {len(names)} classes of variants.txt")
            photos.append(Photo(root / source.images / f"{stem}.jpg", labels[name]))
        splits[split] = photos
    return Data(tuple(names), splits, source.template)


def _from_synsets(source: Source, root: Path) -> Data:
    """ImageNet: images/train and images/val, and classnames.txt with lines such as `n01440764 tench`.

    As in CoOp the validation set is what is tested on. CoOp takes photographs in the order that the file system gives
    them in, which differs between machines; here it is the alphabetical one.
    """
    lines = _text(root / "classnames.txt", "CoOp's names of ImageNet's classes").splitlines()
    called = dict(line.strip().partition(" ")[::2] for line in lines if line.strip())
    folders = [_classes(root / source.images / split) for split in ("train", "val")]
    unknown = [name for name in folders[0] if name not in called]
    if unknown or folders[0] != folders[1]:
        raise ValueError(
            f"{root / source.images}: train has {len(folders[0])} folders, val {len(folders[1])}; they must be the "
            f"same, and each must be in classnames.txt, where these are not: {unknown[:10]}"
        )
    train, val = (_photos(root / source.images / split, folders[0]) for split in ("train", "val"))
    return Data(tuple(called[name] for name in folders[0]), {"train": train, "val": val, "test": val}, source.template)


def _from_folders(source: Source, root: Path) -> Data:
    """Folders train and test, perhaps val, with a folder of images for each class."""
    folders = _classes(root / "train")
    splits = {}
    for split in ("train", "val", "test"):
        if (root / split).is_dir():
            extra = sorted(set(_classes(root / split)) - set(folders))
            if extra:
                raise ValueError(f"{root / split} has classes that {root / 'train'} has not: {extra[:10]}")
            splits[split] = _photos(root / split, folders)
    return Data(tuple(source.renamed.get(name, name) for name in folders), splits, source.template)


def _text(file: Path, what: str) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; expected {what}")
    return file.read_text(encoding="utf-8")


def _names(labelled: Iterable[tuple[int, str]], file: Path) -> tuple[str, ...]:
    """The classes by label.

    Raises:
        ValueError: a label has two names, or one below the largest has none.
    """
    names: dict[int, str] = {}
    for label, name in labelled:
        if names.setdefault(label, name) != name:
            raise ValueError(f"{file}: label {label} is {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{file}: {len(names)} labels are used, and they are not 0 to {len(names) - 1}")
    return tuple(names[label] for label in sorted(names))


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; expected a folder with a folder of images for each class")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _photos(folder: Path, classes: Sequence[str]) -> list[Photo]:
    return [
        Photo(file, label)
        for label, name in enumerate(classes)
        for file in (sorted((folder / name).iterdir()) if (folder / name).is_dir() else ())
        if file.suffix.lower() in IMAGES
    ]


SOURCES: dict[str, Source] = {
    "imagenet": Source("ImageNet", "imagenet", "images", listing=_from_synsets),
    "caltech101": Source(
        "Caltech101",
        "caltech-101",
        "101_ObjectCategories",
        renamed={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
    ),
    "oxford_pets": Source("OxfordPets", "oxford_pets", "images", "a photo of a {}, a type of pet."),
    "stanford_cars": Source("StanfordCars", "stanford_cars", ""),
    "oxford_flowers": Source("OxfordFlowers", "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "food101": Source("Food101", "food-101", "images", "a photo of {}, a type of food."),
    "fgvc_aircraft": Source(
        "FGVCAircraft", "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft.", _from_variants
    ),
    "sun397": Source("SUN397", "sun397", "SUN397"),
    "dtd": Source("DescribableTextures", "dtd", "images", "{} texture."),
    "eurosat": Source("EuroSAT", "eurosat", "2750", "a centered satellite photo of {}."),
    "ucf101": Source("UCF101", "ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
}


def read(name: str, folder: Path) -> Data:
    """Return a data set; whether its photographs are there is checked by `existing`.

    Args:
        name: of `SOURCES`.
        folder: what CoOp calls $DATA, the folder that holds the sets' folders; or one with `train/CLASS/*.jpg` and
            `test/CLASS/*.jpg`.

    Raises:
        FileNotFoundError: what lists the photographs is not there.
        ValueError: it is not what was expected.
    """
    source = SOURCES[name]
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _from_folders(source, folder)
    root = folder / source.folder
    if not root.is_dir():
        raise FileNotFoundError(
            f"{folder} has neither a folder {source.folder!r} (CoOp's layout of {source.title}) nor folders 'train' "
            "and 'test' with a folder of images for each class"
        )
    return source.listing(source, root)


# Few shots ------------------------------------------------------------------------------------------------------------


def few_shot(data: Data, shots: int, seed: int) -> dict[str, list[Photo]]:
    """Return the photographs of "train" and "val" that CoOp draws: `shots` of each class and at most 4 to validate.

    Classes come in the order in which they turn up, and those that have too few photographs have some repeated. As in
    CoOp one source of chance draws the training photographs and then the others.

    Args:
        data: all.
        shots: of each class; 0 takes everything.
        seed: CoOp's are 1, 2 and 3.
    """
    if shots < 0:
        raise ValueError(f"shots={shots}: expected 0 (all photographs) or more")
    chance = random.Random(seed)
    drawn = {}
    for split, count in (("train", shots), ("val", min(shots, 4))):
        photos = data.splits.get(split, ())
        classes: dict[int, list[Photo]] = {}
        for photo in photos:
            classes.setdefault(photo.label, []).append(photo)
        drawn[split] = (
            list(photos) if shots == 0 else [one for some in classes.values() for one in _draw(some, count, chance)]
        )
    return drawn


def _draw(photos: list[Photo], count: int, chance: random.Random) -> list[Photo]:
    return chance.sample(photos, count) if len(photos) >= count else chance.choices(photos, k=count)


def existing(photos: Sequence[Photo], skip_bad: bool = False) -> list[Photo]:
    """Return the photographs whose files are there.

    Raises:
        BadData: one is not, and they are not to be skipped; or there is none.
    """
    there = [photo for photo in photos if photo.file.is_file()]
    absent = [str(photo.file) for photo in photos if not photo.file.is_file()]
    if absent and not skip_bad:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise BadData(
            f"{absent[0]} is listed and is not there{more}: complete the set, or leave it out with --skip-bad"
        )
    if not there:
        raise BadData(f"none of {len(photos)} photographs is there{f': {absent[0]}, ..' if absent else ''}")
    return there


def fingerprint(photos: Sequence[Photo], names: Sequence[str]) -> dict[str, Any]:
    """Return the number of photographs and a digest of their names and classes, in this order."""
    listing = "\n".join(f"{photo.file.parent.name}/{photo.file.name}\t{names[photo.label]}" for photo in photos)
    return {"photos": len(photos), "classes": len(names), "list_sha256": hashlib.sha256(listing.encode()).hexdigest()}


# For training ---------------------------------------------------------------------------------------------------------


def transform(
    size: int, mean: Sequence[float], std: Sequence[float], smallest: float | None = None
) -> Callable[[Any], Tensor]:
    """Return the way from a PIL image to [3, size, size].

    Args:
        size: side in pixels.
        mean, std: per channel, of values in [0, 1].
        smallest: for training: crops of this share of the area or more (the reference has 0.08), and mirroring. None:
            the middle.
    """
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    if smallest is None:
        steps: list[Any] = [transforms.Resize(size, interpolation=bicubic), transforms.CenterCrop(size)]
    else:
        steps = [
            transforms.RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
        ]
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    return composed
