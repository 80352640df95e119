"""Settings and taxonomy: the only readers of the environment, ``.env`` and ``taxonomy.yaml``."""

from config.settings import Settings, load_settings
from config.taxonomy import Taxonomy, load_taxonomy

__all__ = ["Settings", "Taxonomy", "load_settings", "load_taxonomy"]
