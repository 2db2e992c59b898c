"""A small material library and a scene for tests: three copies, three images, two layouts."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import PIL.Image

from kaleidoscope.businesses import get_business
from kaleidoscope.content import Copy, Image, ImageRegion, Layout, Stack, Tag, TextRegion
from kaleidoscope.database import Database, Session
from kaleidoscope.images import store_image
from kaleidoscope.materials import add_material
from kaleidoscope.review import move_materials
from kaleidoscope.scenes import SceneSpec, create_scene, parse_scene
from kaleidoscope.tables import Scene
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person

COPIES = {
    "c1": ("Win a red packet", [("benefit", "red_packet")]),
    "c2": ("Cash back on every purchase", [("benefit", "cash_back")]),
    "c3": ("Trusted by the best brand", [("authority", "brand")]),
}
IMAGES = {
    "i1": [("image_style", "flat"), ("subject", "product")],
    "i2": [("image_style", "realistic"), ("subject", "person")],
    "i3": [("image_style", "flat"), ("subject", "gold")],
}


def layout(height: int = 300, font_size: float = 20) -> Layout:
    """A text beside a square image."""
    return Layout(
        width=600,
        height=height,
        background="#ffffff",
        root=Stack(
            type="row",
            regions=(
                TextRegion(type="text", show="copy.title", font_size=font_size, max_lines=2),
                ImageRegion(type="image", show="image", ratio=1.0),
            ),
        ),
    )


@functools.cache
def _files() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kaleidoscope-pictures-")  # gone with the process


def files() -> Path:
    """The folder that the pictures of this module are kept under."""
    return Path(_files().name)


@functools.cache
def picture(name: str, business: str = "acme") -> Image:
    """A square image that is kept for the business; names with other characters are other images."""
    number = sum(name.encode())
    data = BytesIO()
    PIL.Image.new("RGB", (300, 300), (number // 256, number % 256, 0)).save(data, "PNG")
    return store_image(files(), business, data.getvalue())


def add_library(session: Session, *, prefix: str = "") -> None:
    """Found the taxonomy and add the library; approve nothing."""
    found_taxonomy(session)
    for id, (title, tags) in COPIES.items():
        add_material(session, prefix + id, Copy(title=prefix + title), _tags(tags))
    for id, tags in IMAGES.items():
        image = picture(prefix + id, session.business)
        add_material(session, prefix + id, image, _tags(tags), files_dir=files())
    for id, height in (("l1", 300), ("l2", 320)):
        add_material(session, prefix + id, layout(height + len(prefix)), [])


def _tags(tags: Sequence[tuple[str, str]]) -> list[Tag]:
    return [Tag(dimension=d, value=v) for d, v in tags]


def spec(**changes: object) -> SceneSpec:
    """The scene's spec with some fields changed."""
    return parse_scene(
        {
            "name": "Welcome",
            "slots": [
                {"name": "copy", "kind": "copy", "materials": list(COPIES)},
                {"name": "image", "kind": "image", "materials": list(IMAGES)},
                {"name": "layout", "kind": "layout", "materials": ["l1", "l2"]},
            ],
            "constraints": ["forbid copy.benefit=red_packet with image.subject=product"],
            "baseline": {"copy": "c2", "image": "i1", "layout": "l1"},
            **changes,
        }
    )


def approve_library(session: Session) -> None:
    """Submit and approve every material; the session's caller must not have written them."""
    ids = [*COPIES, *IMAGES, "l1", "l2"]
    assert move_materials(session, "submit", ids).moved == len(ids)
    assert move_materials(session, "approve", ids).moved == len(ids)


def stocked(database: Database, *, approved: bool = False, **changes: object) -> Scene:
    """A database with the library and the scene `welcome` of `ann`; `rex` approves."""
    with database.transaction(person("ann")) as session:
        get_business(session)
        add_library(session)
        scene = create_scene(session, "welcome", spec(**changes))
    if approved:
        with database.transaction(person("rex", Role.ADMIN)) as session:
            approve_library(session)
    return scene
