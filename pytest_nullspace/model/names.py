"""Names of layers from one version of transformers to another, by the libraries' own tables."""

from collections.abc import Collection, Mapping

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


def of_today(model: nn.Module, names: Collection[str]) -> Mapping[str, str]:
    """What transformers makes of the ``names`` of layers when it loads weights that an older one saved."""
    tables = [table for table in get_model_conversion_mapping(model) if isinstance(table, WeightRenaming)]
    return {name: str(rename_source_key(f"{name}.weight", tables, [])[0]).removesuffix(".weight") for name in names}
