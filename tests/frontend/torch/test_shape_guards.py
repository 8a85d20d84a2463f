"""Models that decide by the size of the image."""

import pytest
from torch import nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend import import_model
from helpers import published_style_models as twin

SHAPE = (1, 3, 18, 26)


class Changing(nn.Module):
    """A model that doubles some images first."""

    def __init__(self, decide):
        super().__init__()
        self.classifier = twin.Classifier()
        self.decide = decide

    def forward(self, image):
        return self.classifier(image * 2 if self.decide(*image.shape) else image)


@pytest.mark.parametrize(
    ("decide", "depends"),
    [
        (lambda *shape: shape[2] % 32, r"where \(h % 32\) != 0 \(.*test_shape_guards.py:\d+"),
        (lambda *shape: shape[3] % 2, r"another size; .*where \(w % 2\) == 0"),
        (lambda *shape: shape[2] > 12, "another size; .*where h > 12"),
        (lambda *shape: shape[2] > 4000, "no larger image; got h <= 4000"),
        (lambda *shape: shape[2] == shape[3], "another size; .*where (h != w|w != h)"),
        (lambda *shape: shape[2] * shape[3] > 300, r"another size; .*where (w\*h|h\*w) > 300"),
        (lambda *shape: shape[2] / shape[3] > 0.5, r"another size; .*where \(h / w\) > 0.5"),
        (lambda *shape: shape[2] - shape[3] > -20, "another size; .*where "),
        (lambda *shape: int(shape[2] * 0.5) > 4, "another size; .*where "),
        (lambda *shape: round(shape[2] / 3) > 5, "another size; .*where "),
        (lambda *shape: (shape[2] * shape[3]) ** 0.5 > 10, "another size; .*where "),
        (lambda *shape: shape[0] > 3, "no larger image; got n <= 3"),
        (lambda *shape: shape[2] == 18, "torch.export cannot trace"),
        (lambda *shape: 9 * shape[3] == 13 * shape[2], "another size; .*where "),
    ],
)
def test_refuses_open_sizes_on_which_the_model_decides(decide, depends):
    open_sizes = {"dynamic_batch": True, "dynamic_size": True}
    with pytest.raises(ModelImportError, match=depends):
        import_model(Changing(decide), example=SHAPE, features="never", **open_sizes)


def test_takes_decisions_on_sizes_that_are_fixed():
    by_height = Changing(lambda *shape: shape[2] % 32)
    import_model(by_height, example=SHAPE, features="never", dynamic_batch=True)
    by_batch = Changing(lambda *shape: shape[0] > 3)
    import_model(by_batch, example=SHAPE, features="never", dynamic_size=True)
