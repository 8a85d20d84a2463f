"""What happened to each key of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Final

_LISTED: Final = 8
"""Most names in a text."""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each key of a checkpoint.

    Parameters
    ----------
    path : str
        The file.
    source : str
        Container and key prefix of the weights in the file.
    loaded : int
        Number of tensors loaded.
    missing : tuple of str
        Keys of the model that the checkpoint does not have.
    unexpected : tuple of str
        Keys of the checkpoint's InternImage that the model does not have.
    wrong_shape : tuple of str
        Keys whose shapes differ, with both shapes.
    skipped : tuple of str
        Keys of other parts of a larger model (a detector's heads), or of a classification head
        that the model was built without.
    ignored : tuple of str
        Other content of the file: containers, objects.
    """

    path: str
    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the weights fit the model exactly."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors from {self.path}" + (self.source and f" ({self.source})")]
        lines += [
            f"{label}: {shortened(keys)}"
            for label, keys in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("wrong shape", self.wrong_shape),
            )
            if keys
        ]
        if self.skipped:
            parts = Counter(key.split(".")[0] for key in self.skipped)
            lines.append("skipped: " + ", ".join(f"{part}.* ({n})" for part, n in parts.items()))
        if self.ignored:
            lines.append(f"ignored: {shortened(self.ignored)}")
        return "\n".join(lines)


def shortened(names: Iterable[str], limit: int = _LISTED) -> str:
    """Join names with commas; after `limit` names only their number."""
    listed = list(names)
    text = ", ".join(listed[:limit]) or "nothing"
    return f"{text}, and {len(listed) - limit} more" if len(listed) > limit else text
