"""Which values of a config are only there for others to refer to, as in ``${cache}/runs``."""

import re
from typing import Any

from omegaconf import OmegaConf


def variables_in(cfg: Any) -> set[str]:
    """Return the names behind ``${`` in an unresolved config: ``oc`` for ``oc.env``."""
    return set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(cfg)))
