"""Which classes of other packages have a fast forward, by exact name, so that none of them is imported."""

from __future__ import annotations

from lmim_fast.layers.fast_forwards import hugging_face, torch_layers, vit
from lmim_fast.layers.fast_forwards.form import Form

FORMS: dict[str, Form] = torch_layers.FORMS | vit.FORMS | hugging_face.FORMS
"""Fast forms by the name that `accelerate(model, like=...)` takes."""

CLASSES: dict[str, str] = torch_layers.CLASSES | vit.CLASSES | hugging_face.CLASSES
"""Name of the form of each class, by the class's own qualified name."""

PARTS: dict[str, str] = vit.PARTS
"""Classes that have no form but that forms of other layers know."""
