"""The build backend: setuptools', except that torch is asked for only where there is none.

The extension uses torch's stable ABI, so it needs the headers of any torch that is new enough. A
torch that the target environment has already will do; fetching a second one takes gigabytes.
"""

from find_torch import MIN_TORCH, find_torch, refuse_old
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  the hooks that stay as they are
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings=None):
    torch = find_torch()
    refuse_old(torch)
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    requires += ["ninja", "pybind11"]
    if torch is None:
        requires.append("torch>={}.{}".format(*MIN_TORCH))
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel
