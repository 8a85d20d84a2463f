"""Models whose result depends on earlier calls or on random numbers are rejected."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.entry_points import EntryPoint
from dcnv3_tvm.frontend.torch.export import export_entry_point
from dcnv3_tvm.frontend.torch.model_inputs import ModelInputs
from dcnv3_tvm.frontend.torch.model_state import ModelState, TensorValue

SHAPE = (2, 3, 4, 5)
kept = {}
count = 0


class Model(nn.Module):
    """Applies a step, a function of the module and a tensor."""

    def __init__(self, step, **attributes):
        super().__init__()
        self.step = step
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("buffer", torch.ones(SHAPE))
        self.register_buffer("calls", torch.zeros(()))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, image):
        return self.step(self, self.conv(image))


def export(model, *, dynamic=False):
    inputs = ModelInputs.of(model, SHAPE, dynamic_batch=False, multiple=int(dynamic))
    return export_entry_point(EntryPoint(model, inputs))


def add_last(self, y):
    result = y if self.last is None else y + self.last
    self.last = y
    return result


def add_assigned_buffer(self, y):
    result = y + self.buffer
    self.buffer = y
    return result


def add_buffer(self, y):
    result = y + self.buffer
    self.buffer.mul_(0.9).add_(y)
    return result


def scale_by_count(self, y):
    self.count += 1
    return y * self.count


def third_call(self, y):
    self.count = min(self.count + 1, 3)
    return y * 2 if self.count == 3 else y


def append(self, y):
    self.history.append(y)
    return sum(self.history)


def write_to_list(self, y):
    result = y + self.history[0]
    self.history[0].copy_(y)
    return result


def use_global(_self, y):
    result = y + kept.get("y", 0.0)
    kept["y"] = y
    return result


def use_global_number(_self, y):
    global count
    count += 1
    return y * count


def use_default(_self, y, earlier=[]):  # noqa: B006
    earlier[:] = [*earlier[-1:], y]
    return sum(earlier)


def enclosing():
    last = None

    def step(_self, y):
        nonlocal last
        result = y if last is None else y + last
        last = y
        return result

    return step


STATEFUL = {
    "last": (add_last, {"last": None}),
    "buffer": (add_assigned_buffer, {}),
    "buffer, in place": (add_buffer, {}),
    "count": (scale_by_count, {"count": 0}),
    "count, not at once": (third_call, {"count": 0}),
    r"len\(history\)": (append, {"history": []}),
    r"history\[0\]": (write_to_list, {"history": [torch.zeros(SHAPE)]}),
    r"test_call_state\.kept\['y'\]": (use_global, {}),
    r"test_call_state\.count": (use_global_number, {}),
    r"step\.__defaults__\[0\]": (use_default, {}),
    r"step\.last": (enclosing(), {}),
    "Python's random numbers": (lambda _, y: y * random.random(), {}),
    "NumPy's random numbers": (lambda _, y: y * float(np.random.rand()), {}),
}


def values(model):
    """Return the state of a model, without versions of tensors and the generators' states."""
    read = ModelState(model).read()
    return {
        name: value[0] if isinstance(value, TensorValue) else value
        for name, value in read.items()
        if "random" not in name
    }


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_rejected_by_name_and_restored(name):
    step, attributes = STATEFUL[name]
    model = Model(step, **attributes)
    before = values(model)
    expected = name.split(",")[0]
    with pytest.raises(ModelImportError, match=f"earlier calls; got .*{expected}"):
        export(model)
    assert values(model) == before


def cache_grid(self, y):
    if self.size != y.shape[2:]:
        self.size, self.device = y.shape[2:], torch.device(y.device.type)
        self.grid = torch.arange(y.shape[3], dtype=y.dtype) + y.new_zeros(y.shape[2:])
    self.kind = np.int64(len(y.shape))
    return y + self.grid


def store(self, y):
    self.last = y
    self.calls.copy_(y.mean())
    return y


def write_to_result(_self, y):
    return y.mul_(2).clamp_(0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("step", "attributes"),
    [(cache_grid, {"size": None, "scale": float("nan")}), (store, {}), (write_to_result, {})],
    ids=["cache", "not read", "in place"],
)
def test_state_that_does_not_matter(step, attributes, dynamic):
    model = Model(step, **attributes)
    program = export(model, dynamic=dynamic)
    image = torch.randn(SHAPE)
    (got,) = program.module()(image)
    torch.testing.assert_close(got, model(image))


@pytest.mark.parametrize(
    "step",
    [
        lambda _, y: F.dropout(y, 0.5, training=True),
        lambda _, y: y + torch.rand_like(y),
        lambda _, y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.1),
    ],
    ids=["dropout", "rand", "attention"],
)
def test_random_numbers_are_rejected(step):
    with pytest.raises(ModelImportError, match=r"(?s)draws random numbers.*test_call_state\.py"):
        export(Model(step))


def test_operators_without_randomness_are_accepted():
    export(Model(lambda _, y: F.dropout(F.scaled_dot_product_attention(y, y, y), 0.5, False)))


def test_decision_by_values_names_the_line(capfd):
    def step(_self, y):
        return y if y.mean() > 0 else -y

    with pytest.raises(ModelImportError, match=r"by the values of a tensor.*return y if y\.mean"):
        export(Model(step))
    assert capfd.readouterr() == ("", "")  # Not the graph that torch.export prints.
