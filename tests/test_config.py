import dataclasses
import json
from typing import Literal

import pytest

from jaxrec import config
from jaxrec.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "constant"] = "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    width: int
    inner: Inner = Inner()
    window: int | None = None
    sizes: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    tied: bool = False

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}.")


@pytest.mark.parametrize(
    "outer",
    [
        Outer(width=2),
        Outer(width=4, inner=Inner(rate=1e-4, kind="constant"), window=3, sizes=(1, 2), tied=True),
    ],
)
def test_round_trip_through_json(outer):
    assert config.from_dict(Outer, json.loads(json.dumps(config.to_dict(outer)))) == outer


def test_numbers_as_json_and_yaml_write_them():
    assert config.from_dict(Inner, {"rate": 1}) == Inner(rate=1.0)
    assert config.from_dict(Inner, {"rate": "1e-4"}) == Inner(rate=1e-4)  # YAML: a string


@pytest.mark.parametrize(
    "data, message",
    [
        ({"widht": 2}, r"Outer has no field widht\. Did you mean width\? The fields are: width, "),
        (
            {"width": 2, "inner": {"rat": 1.0}},
            r"Inner has no field inner\.rat\. Did you mean rate\?",
        ),
        ({}, r"Outer needs a value for the field width\."),
        ({"width": 3}, r"width must be even, got 3\."),
        ({"width": 2.5}, r"width must be of type int; got 2\.5\."),
        ({"width": True}, r"width must be of type int; got True\."),
        ({"width": None}, r"width must be of type int; got None\."),
        ({"width": 2, "window": "x"}, r"window must be of type int; got 'x'\."),
        ({"width": 2, "tied": "yes"}, r"tied must be of type bool; got 'yes'\."),
        ({"width": 2, "sizes": 3}, r"sizes must be a list; got 3\."),
        ({"width": 2, "sizes": [1, "2"]}, r"sizes must be of type int; got '2'\."),
        ({"width": 2, "betas": [0.9]}, r"betas must have 2 entries; got \[0\.9\]\."),
        (
            {"width": 2, "inner": {"rate": "fast"}},
            r"inner\.rate must be of type float; got 'fast'\.",
        ),
        (
            {"width": 2, "inner": {"kind": "cosin"}},
            r"inner\.kind must be one of cosine, constant; got 'cosin'\. Did you mean cosine\?",
        ),
        ({"width": 2, "inner": 3}, r"inner\.: expected a mapping of fields, got 3\."),
        ([1], r"Outer: expected a mapping of fields, got \[1\]\."),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(UserError, match=f"^{message}"):
        config.from_dict(Outer, data)


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "__init__.py").touch()
    (tmp_path / "systems" / "huginn.py").write_text("TINY = 7\nSMALL = 8\n")
    (tmp_path / "systems" / "needy.py").write_text("import systems_extra\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("package")
def test_objects_are_loaded_by_import_path():
    assert config.load_object("systems.huginn:TINY") == 7


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "path, message",
    [
        ("systems.huginn", r"'systems\.huginn' is not of the form package\.module:NAME"),
        (":TINY", r"':TINY' is not of the form"),
        ("systems.hugin:TINY", r"no module systems\.hugin\. Did you mean systems\.huginn\?"),
        ("no_such_package.huginn:TINY", r"There is no module no_such_package\.huginn\."),
        ("no_such_module:TINY", r"There is no module no_such_module\."),
        ("systems.huginn:TINNY", r"has no TINNY\. Did you mean TINY\? It has: TINY, SMALL\."),
    ],
)
def test_what_cannot_be_loaded_is_named(path, message):
    with pytest.raises(UserError, match=message):
        config.load_object(path)


@pytest.mark.usefixtures("package")
def test_a_missing_dependency_is_not_a_missing_model():
    with pytest.raises(ModuleNotFoundError, match="systems_extra"):
        config.load_object("systems.needy:TINY")


def test_nearest():
    assert nearest("cosin", ["constant", "cosine"]) == " Did you mean cosine?"
    assert nearest("xyz", ["constant", "cosine"]) == ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(Inner):
    more: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Either:
    part: Inner | Longer | None = None


def test_one_of_several_kinds_is_known_by_its_fields():
    for part in (None, Inner(rate=0.5), Longer(rate=0.5)):
        there = config.from_dict(Either, config.to_dict(Either(part=part)))
        assert there.part == part and type(there.part) is type(part)
    with pytest.raises(UserError, match=r"part must have the fields of one of Inner \(.*; Longer"):
        config.from_dict(Either, {"part": {"less": 1}})
