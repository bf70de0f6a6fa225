"""Building networks whole while DeepSpeed would cut every new parameter into pieces."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Switches ZeRO-3's partitioned initialisation off for what is built inside.

    Two mechanisms partition: transformers looks for a live stage-3 HfDeepSpeedConfig in `from_pretrained`,
    and `deepspeed.zero.Init` patches the constructors of all modules. Neither accelerate's switches nor a
    nested `zero.Init(enabled=False)` stops them (accelerate 1.15, deepspeed 0.19.8), so this takes the
    configuration away and the patches off, and puts both back, also when an exception passes through.

    A no-op where deepspeed is not installed or was never imported. Not thread-safe: the patches are global.
    """
    config = _take_transformers_config()
    partition = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    context: Any = getattr(partition, "top_level_context", None)
    is_patched = context is not None and context.patched
    if is_patched:
        context.unpatch_init_and_builtins()
    try:
        yield
    finally:
        if is_patched:
            context.patch_init_and_builtins()
        if config is not None:
            sys.modules["transformers.integrations.deepspeed"].set_hf_deepspeed_config(config)


def _take_transformers_config() -> object | None:
    """The live HfDeepSpeedConfig, unset; the caller's reference keeps it alive (transformers' is weak)."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        return None
    reference = integration._hf_deepspeed_config_weak_ref
    config: object | None = reference() if reference is not None else None
    if config is not None:
        integration.unset_hf_deepspeed_config()
    return config
