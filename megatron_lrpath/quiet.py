"""For commands whose answer is what counts: no word of what the libraries say on every import."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence warnings of imports (what is not installed) and Megatron's account of what it opens."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.WARNING)
