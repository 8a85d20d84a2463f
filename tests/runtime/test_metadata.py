"""Malformed metadata: each ends in an error of this library."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest

from dcnv3_tvm import runtime
from dcnv3_tvm.errors import ArtifactError, DCNv3Error
from dcnv3_tvm.runtime import metadata as metadata_file
from dcnv3_tvm.runtime.metadata import ArtifactMetadata
from dcnv3_tvm.spec import DCNv3Params

FILLED = {
    "verification": {"ok": True, "reference": "PyTorch", "outputs": [{"max_error": 1e-7}]},
    "records": {"kernel": "hit"},
    "records_from": {"target": "cpu", "hardware": "CPU", "date": "2026-01-01"},
}
JUNK = [
    None,
    True,
    0,
    -1,
    2.5,
    float("nan"),
    10**30,
    "",
    "8",
    "\ud800",
    [],
    {},
    [[]],
    ["a"],
    {"a": 1},
]


@pytest.fixture
def data(artifact_path):
    values = json.loads((artifact_path / "metadata.json").read_text())
    del values["digest"]
    return copy.deepcopy(values | FILLED)


def sealed(data):
    return json.dumps(data | {"digest": metadata_file._digest(data)})


def places(value, path=()):
    """Yield the path of every value."""
    yield path
    if not isinstance(value, dict | list):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(item, (*path, key))


def at(data, path):
    for key in path:
        data = data[key]
    return data


def mutate(data, rng):
    """Remove, replace, move or nest one value or several."""
    changed = copy.deepcopy(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        paths = list(places(changed))[1:]
        *parent, key = rng.choice(paths)
        holder = at(changed, parent)
        action = rng.choice(["remove", "junk", "copy", "nest"])
        if action == "remove":
            del holder[key]
        elif action == "junk":
            holder[key] = rng.choice(JUNK)
        elif action == "copy":
            holder[key] = copy.deepcopy(at(changed, rng.choice(paths)))
        else:
            holder[key] = json.loads("[" * 200 + "]" * 200)
    return changed


def test_mutated_metadata(artifact_path, data, image):
    rng = random.Random(0)
    path = artifact_path / "metadata.json"
    outcomes = {"error": 0, "works": 0}
    for _ in range(200):
        path.write_text(sealed(mutate(data, rng)))
        try:
            with runtime.load(artifact_path) as model:
                model(image)
                model.features(model.preprocess(np.zeros((9, 9, 3), np.uint8)))
                model.metadata.dumps()
        except DCNv3Error:
            outcomes["error"] += 1
        else:
            outcomes["works"] += 1
    assert min(outcomes.values()) > 20


BLOCK = {"params": dataclasses.asdict(DCNv3Params(group=2)), "size": [8, 8]}
TENSOR = {"name": "offset_0", "shape": [1, 8, 8, 36], "dtype": "float32"}


def offsets(**changes):
    return {"inputs": [TENSOR], "outputs": [TENSOR, TENSOR], "blocks": [BLOCK | changes]}


def test_entry_of_offsets(data):
    data["entries"]["offsets"] = offsets()
    (block,) = ArtifactMetadata.loads(sealed(data)).entries["offsets"].blocks
    assert (block.params, block.size) == (DCNv3Params(group=2), (8, 8))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("entries", "offsets"), offsets() | {"blocks": []}, "not two outputs for each"),
        (("entries", "offsets"), offsets(size=[8]), "has not two sizes"),
        (("entries", "offsets"), offsets(params={"group": 0}), "params has no kernel_size"),
        (("name",), 5, "metadata.name is of type int, not str"),
        (("target",), [], "target is of type list, not dict"),
        (("target", "features"), "avx2", r"metadata\.target\.features is of type str, not list"),
        (("versions", "tvm"), None, r"versions\.tvm is of type NoneType"),
        (("entries",), {}, "entries has no main"),
        (("entries", "main", "inputs"), [], "entry 'main' has no inputs"),
        (("entries", "main", "inputs", 0, "shape", 0), True, r"shape\[0\] is of type bool"),
        (("entries", "main", "inputs", 0, "shape", 0), 0, r"'image' .*shape \[0, 3, 8, 8\]"),
        (("entries", "main", "inputs", 0, "layout"), "NC", "layout 'NC' and 4 axes"),
        (("entries", "main", "inputs", 0, "shape", 2), "x*h", r"the size 'x\*h'"),
        (("entries", "main", "inputs", 0, "shape", 2), "0*h", r"the size '0\*h'"),
        (("verification", "outputs"), [], "verification has no outputs"),
        (("verification", "outputs", 0), {}, r"outputs\[0\] has no max_error"),
        (("records_from",), {}, "records_from has no "),
    ],
)
def test_wrong_value(data, path, value, message):
    at(data, path[:-1])[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        ArtifactMetadata.loads(sealed(data))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested(opening):
    with pytest.raises(ArtifactError, match="not valid JSON"):
        ArtifactMetadata.loads(opening * 200_000)


@pytest.mark.parametrize("depth", [300, 600, 900, 960, 990])
def test_nested_almost_too_deep(data, depth):
    # Parsing a value may succeed where writing it to compute the digest fails.
    text = json.dumps(data | {"config": None}).replace("null", "[" * depth + "]" * depth)
    with pytest.raises(ArtifactError):
        ArtifactMetadata.loads(text)


def test_unknown_fields_are_ignored(data):
    assert ArtifactMetadata.loads(sealed(data | {"new": 1})).name == "toy"
