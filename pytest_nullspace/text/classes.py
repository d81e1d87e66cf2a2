"""Which classes of transformers a model's processor of images is made of; those that a checkpoint brings never run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError

LEAST = "5.11"
"""The first transformers whose processors all tell which of their tokens stand for an image, and read one by Pillow."""


def classes(fields: Mapping[str, Any], of_image: Mapping[str, Any], model: object, directory: Path) -> tuple[Any, Any]:
    """The processor's class, and that of its part that reads images: both of transformers itself, by Pillow if any.

    Args:
        fields: What ``directory`` says of the processor.
        of_image: And of that part.
        model: The ``model_type`` of the base's config.
        directory: Where that lies, for messages.

    Raises:
        CheckpointError: Transformers has none of its own for the model, lacks what it is built with, or is too old.
    """
    import transformers

    if not hasattr(transformers.ProcessorMixin, "image_token_ids"):
        raise CheckpointError(
            f"{directory}: images are read with transformers {LEAST} or later, and {transformers.__version__} is "
            f"installed; pip install 'transformers>={LEAST}', or gate the model on text"
        )
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    def known(names: Sequence[object], parent: str) -> tuple[Any, str]:
        """The first that there is; of one that wants what is not installed its name, and that."""
        for name in names:
            found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
            if isinstance(found, type) and issubclass(found, getattr(transformers, parent)):
                return found, ""
            if found is not None and (packages := getattr(found, "_backends", None)):  # what stands for it without them
                return None, f"{name} with {' and '.join(packages)}"
        return None, ""

    model = model if isinstance(model, str) else ""
    kind, wants = known(
        [fields.get("processor_class"), of_image.get("processor_class"), PROCESSOR_MAPPING_NAMES.get(model)],
        "ProcessorMixin",
    )
    said = str(of_image.get("image_processor_type") or of_image.get("feature_extractor_type") or "")
    said = said.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    usual = IMAGE_PROCESSOR_MAPPING_NAMES.get(model, {})
    image_kind, image_wants = known(
        [f"{said}Pil", said, usual.get("pil"), usual.get("torchvision")], "ImageProcessingMixin"
    )
    if kind is not None and image_kind is not None and hasattr(kind, "get_attributes"):
        return kind, image_kind
    lacking = image_wants or wants
    if lacking and (kind or wants) and (image_kind or image_wants):
        raise CheckpointError(
            f"{directory}: transformers builds {printable(lacking)}, which is not installed; install that, or gate the "
            "model on text"
        )
    raise CheckpointError(
        f"{directory}: transformers {transformers.__version__} has no processor of its own that reads images for "
        f"model_type {printable(model)}; gate the model on text"
    )
