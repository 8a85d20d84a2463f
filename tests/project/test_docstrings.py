"""Docstrings: examples run, and public names document parameters, results and errors."""

import doctest
import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import dcnv3_tvm
from dcnv3_tvm import errors, frontend, runtime, schedules

PUBLIC = (dcnv3_tvm, frontend, runtime)

# frontend and schedules are mapped into the package, so its __path__ does not contain them.
MODULES = sorted(
    info.name
    for package in (dcnv3_tvm, frontend, schedules)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)

SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)


def example_modules() -> list[str]:
    """List the modules whose source has an example, without importing them."""
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        with open(spec.origin, encoding="utf-8") as source:
            if ">>> " in source.read():
                found.append(name)
    return found


RETURNED_ONLY = {"CompiledModel"}
"""Classes that functions return and users do not construct."""

PUBLIC_NAMES = [f"{module.__name__}:{name}" for module in PUBLIC for name in module.__all__]


@pytest.fixture
def obj(request: pytest.FixtureRequest) -> Any:
    """Import a public name when its test runs, not at collection."""
    module, _, name = request.param.partition(":")
    return getattr(importlib.import_module(module), name)


def sections(obj: Any) -> dict[str, str]:
    """Split a docstring into its summary ("") and its sections."""
    text = inspect.getdoc(obj) or ""
    pieces = SECTION.split(text)
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def documented_names(section: str) -> set[str]:
    """List the names in a Parameters section, such as ``x, offset : array``."""
    heads = [line for line in section.splitlines() if line and not line[0].isspace()]
    return {
        name.strip().lstrip("*") for head in heads for name in head.partition(" :")[0].split(",")
    }


def test_modules_are_found():
    assert {"dcnv3_tvm.spec", "dcnv3_tvm.op.reference"} <= set(MODULES)
    assert {"dcnv3_tvm.schedules.cpu", "dcnv3_tvm.frontend.models.variants"} <= set(MODULES)
    assert "dcnv3_tvm.spec" in example_modules()


@pytest.mark.parametrize("name", example_modules())
def test_docstring_examples_run(name: str):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not results.failed


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names_exist(module: ModuleType):
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("obj", PUBLIC_NAMES, indirect=True)
def test_public_names_document_parameters_results_and_errors(obj: Any):
    text = sections(obj)
    assert re.match(r"[A-Z`][^\n]*\.(\n|$)", text[""]), "no one-line summary"
    if not callable(obj) or is_error(obj) or obj.__name__ in RETURNED_ONLY:
        return
    parameters = set(inspect.signature(obj).parameters)
    documented = documented_names(text.get("Parameters", ""))
    assert parameters <= documented, f"not documented: {sorted(parameters - documented)}"
    if inspect.isclass(obj):
        return
    returns = inspect.signature(obj).return_annotation
    if returns not in (None, "None"):
        assert "Returns" in text or "Yields" in text
    if has_raise(obj):
        assert "Raises" in text


@pytest.mark.parametrize("obj", PUBLIC_NAMES, indirect=True)
def test_public_methods_have_docstrings(obj: Any):
    if not inspect.isclass(obj):
        return
    for name, member in vars(obj).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{obj.__name__}.{name}"


def test_every_error_class_has_its_own_docstring():
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, (errors.DCNv3Error, errors.DCNv3Warning))
        assert inspect.getdoc(cls) != inspect.getdoc(cls.__base__), cls.__name__


def is_error(obj: Any) -> bool:
    return inspect.isclass(obj) and issubclass(obj, Exception)


def has_raise(function: Any) -> bool:
    """Whether the body has a raise statement."""
    return "raise " in inspect.getsource(function)
