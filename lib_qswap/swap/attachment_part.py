"""What belongs to one attachment."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_qswap.swap.manager import Attachment


class AttachmentPart:
    """Holds its attachment weakly: it goes with its model, when nobody else holds that."""

    def __init__(self, model: Attachment) -> None:
        self._reference = weakref.ref(model)

    @property
    def _model(self) -> Attachment:
        model = self._reference()
        if model is None:
            raise ReferenceError("the model is gone")
        return model
