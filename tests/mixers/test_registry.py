"""Names, specs and patterns, on toy classes; tests/test_third_party.py does the same with an installed package."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, Registry, SpecError, parse_pattern, parse_spec

ROOT = Path(__file__).parents[2]


class Toy:
    def __init__(self, *, width: int, depth: int = 1):
        self.width, self.depth = width, depth


class Plain(Toy):
    pass


class Deep(Toy):
    def __init__(self, *, height: int = 7, **options):
        super().__init__(**options)
        self.height = height


class NoToy:
    pass


@pytest.fixture
def toys() -> Registry:
    return Registry(
        kind="toy",
        base=f"{__name__}:Toy",
        group="lightning_mixers.toys",
        builtin={"plain": f"{__name__}:Plain", "gone": "no_such_module:Gone", "wrong": f"{__name__}:NoToy"},
        aliases={"p": "plain"},
    )


@pytest.fixture
def declare(tmp_path, monkeypatch):
    """Declares entry points of a distribution, as installing it would."""

    def declare(distribution: str, **points: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[lightning_mixers.toys]", *lines]))
        monkeypatch.syspath_prepend(folder)

    return declare


def test_a_name_an_alias_and_both_forms_of_path_give_one_class(toys):
    assert {toys.get(name) for name in ("plain", "p", f"{__name__}.Plain", f"{__name__}:Plain")} == {Plain}
    assert toys.origin("p") == toys.origin("plain") == toys.origin(f"{__name__}.Plain") == f"{__name__}:Plain"


def test_names_are_sorted_and_without_aliases(toys):
    toys.register("another")(Plain)
    assert toys.names() == ["another", "gone", "plain", "wrong"]
    assert toys.aliases() == {"p": "plain"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plian", "unknown toy 'plian'; known: gone, plain, wrong. Did you mean 'plain'?"),
        ("PLAIN", "unknown toy 'PLAIN'; known: gone, plain, wrong. Did you mean 'plain'?"),
        ("xyz", "unknown toy 'xyz'; known: gone, plain, wrong."),
        ("..", "unknown toy '..'; known: gone, plain, wrong."),
        ("gone", "toy 'gone': cannot import 'no_such_module': No module named 'no_such_module'"),
        ("no_such_module.Gone", "toy 'no_such_module.Gone': cannot import 'no_such_module': No module named"),
        (f"{__name__}.Plian", f"unknown class 'Plian' in module '{__name__}'; known: "),
        (f"{__name__}.Plian", "Did you mean 'Plain'?"),
        ("wrong", f"{__name__}:NoToy is no toy: it does not subclass {__name__}.Toy"),
        (f"{__name__}.ROOT", f"is no toy: it does not subclass {__name__}.Toy"),
    ],
)
def test_a_wrong_name_is_one_clear_line(toys, name, message):
    with pytest.raises(SpecError) as error:
        toys.get(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_registered_class_is_built_by_name(toys):
    @toys.register("mine")
    class Mine(Toy):
        pass

    assert toys.get("mine") is Mine
    assert toys.origin("mine").endswith("<locals>.Mine")
    assert type(toys.build("mine", width=3)) is Mine


def test_a_class_defined_again_takes_its_own_place_and_another_is_refused(toys):
    def define() -> type:
        return toys.register("mine")(type("Mine", (Toy,), {"__module__": __name__}))

    first, second = define(), define()
    assert first is not second
    assert toys.get("mine") is second
    with pytest.raises(SpecError, match=rf"toy 'mine' is already {__name__}:Mine; {__name__}:Deep needs another name"):
        toys.register("mine")(Deep)


@pytest.mark.parametrize("name", ["plain", "p"])
def test_a_built_in_name_or_alias_cannot_be_taken(toys, name):
    with pytest.raises(SpecError, match=f"toy '{name}' is already"):
        toys.register(name)(Deep)


def test_only_parts_with_plain_names_can_be_registered(toys):
    with pytest.raises(SpecError, match="NoToy is no toy"):
        toys.register("mine")(NoToy)
    for name in ("my.toy", "toy*2", "a,b", ""):
        with pytest.raises(SpecError, match="not an identifier"):
            toys.register(name)
    assert "mine" not in toys.names()


def test_an_entry_point_adds_a_name(toys, declare):
    declare("one", deep=f"{__name__}:Deep")
    assert "deep" in toys.names()
    assert toys.get("deep") is Deep
    assert toys.register("deep")(Deep) is Deep  # its own module may use the decorator too
    with pytest.raises(SpecError, match="toy 'deep' is already"):
        toys.register("deep")(Plain)


def test_an_entry_point_cannot_take_a_built_in_name(toys, declare):
    declare("one", plain=f"{__name__}:Deep")
    with pytest.warns(UserWarning, match=f"toy 'plain' of {__name__}:Deep is ignored: it is {__name__}:Plain"):
        toys.names()
    assert toys.get("plain") is Plain


def test_a_name_that_two_packages_declare_is_refused(toys, declare):
    declare("one", both=f"{__name__}:Deep")
    declare("two", both=f"{__name__}:Plain")
    with pytest.raises(SpecError, match="toy 'both' is declared more than once: .*; use a class path"):
        toys.get("both")


def test_build_takes_options_from_the_spec_and_from_the_caller(toys):
    spec = {"name": "plain", "width": 3, "depth": 2}
    toy = toys.build(spec, depth=5)
    assert (toy.width, toy.depth) == (3, 5)
    assert spec == {"name": "plain", "width": 3, "depth": 2}


def test_options_include_those_that_a_constructor_passes_on(toys):
    toys.register("deep")(Deep)
    assert list(toys.options("deep")) == ["height", "width", "depth"]
    assert toys.options("plain")["depth"].default == 1
    toy = toys.build("deep", width=2, height=4)
    assert (toy.width, toy.height) == (2, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "plain", "widht": 3},
            "unknown option 'widht' for toy 'plain'; known: width, depth. Did you mean 'width'?",
        ),
        ("plain", "toy 'plain': missing a required argument: 'width'"),
        ({"name": "plain", "width": "3"}, "'width' of toy 'plain' must be int, got '3'"),
        ({"name": "plain", "width": True}, "'width' of toy 'plain' must be int, got True"),
        ({"width": 3}, "expected a name, or a mapping with a 'name' and options; got {'width': 3}"),
    ],
)
def test_a_wrong_option_is_one_clear_line(toys, spec, message):
    with pytest.raises(SpecError) as error:
        toys.build(spec)
    assert str(error.value) == message


def test_specs():
    spec = {"name": "ham", "router": {"name": "learned"}}
    assert parse_spec(" ham ") == {"name": "ham"}
    assert parse_spec(spec) == spec
    assert parse_spec(spec) is not spec
    for wrong in (3, None, "", {}, {"name": 3}, {"name": "ham", 4: 5}, ["ham"]):
        with pytest.raises(SpecError):
            parse_spec(wrong)


def test_patterns():
    gdn, attention = {"name": "gdn"}, {"name": "attention"}
    assert parse_pattern("gdn") == [gdn]
    assert parse_pattern("gdn*3, attention") == [gdn, gdn, gdn, attention]
    assert parse_pattern(["gdn*2", "attention"]) == [gdn, gdn, attention]
    assert parse_pattern({"name": "ham", "kv_usage": 0.5}) == [{"name": "ham", "kv_usage": 0.5}]
    assert parse_pattern([{"name": "ham", "kv_usage": 0.5}, "gdn"]) == [{"name": "ham", "kv_usage": 0.5}, gdn]
    repeated = parse_pattern("gdn*2")
    repeated[0]["kv_usage"] = 1
    assert repeated[1] == gdn
    for wrong in ("", "gdn,,attention", "gdn*0", "gdn*", "gdn*x", "*3", [], None, 3, [["gdn"]], ["gdn", None]):
        with pytest.raises(SpecError):
            parse_pattern(wrong)


@pytest.mark.parametrize("registry", [MIXERS, ROUTERS, THRESHOLDS], ids=lambda registry: registry.kind)
def test_every_built_in_name_can_be_imported(registry):
    for name in [*registry.names(), *registry.aliases()]:
        assert registry.options(name) is not None


def test_listing_imports_no_torch():
    code = (
        "import sys; from mixers import list_mixers, list_routers; print(*list_mixers(), *list_routers());"
        "assert 'torch' not in sys.modules"
    )
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"ham", "gated_delta_net", "cosine"} <= set(listed.split())


def test_every_exported_name_exists():
    import mixers

    assert all(getattr(mixers, name) for name in mixers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mixers.nonsense  # noqa: B018
