"""Checkpoints used by the tests of this folder."""

import torch

from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from dcnv3_tvm.verify.random_weights import randomize_

NAME = "test_internimage_post_norm_scale"


def random_state(name=NAME, seed=1):
    return randomize_(InternImage(VARIANTS[name]), seed=seed).state_dict()


def with_prefix(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def saved(path, data):
    torch.save(data, path)
    return path


def assert_holds(model, state):
    own = model.state_dict()
    assert own
    for key, value in own.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, msg=key)
