"""Silence for foreign progress bars and advice: a rank's log is for the run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Switches the bars and advice of transformers and diffusers off inside, and back to what they were.

    Deprecations too: diffusers' combined pipeline passes arguments that its own decoder pipeline deprecates.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (verbosity, had_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()
