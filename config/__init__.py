"""Settings and taxonomy: the only code that reads the environment, ``.env`` and ``taxonomy.yaml``.

Any package may import any of its modules. It imports only ``error_handler``.
"""

from config.examples import load_prompt_taxonomy
from config.settings import Settings, load_settings
from config.taxonomy import Taxonomy, load_taxonomy

__all__ = ["Settings", "Taxonomy", "load_prompt_taxonomy", "load_settings", "load_taxonomy"]
