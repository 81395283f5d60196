"""Detached actors: they outlive whoever made them, and Ray restarts them in place without limit.

A name belongs to one actor of a Ray. Does not cover: which actors there are (``ray_nodes``,
``ray_tier``).
"""

from typing import Any

import ray

from kvstore.cluster.plan import RAY_NAMESPACE


def detached(kind: type[Any], name: str, *arguments: object, **placement: object) -> Any:
    """The actor by that name; made of ``kind`` and ``arguments`` unless Ray has it."""
    options: dict[str, Any] = {
        "name": name,
        "namespace": RAY_NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,  # without limit
        "num_cpus": 0,
    }
    actor: Any = ray.remote(kind)
    return actor.options(**options, **placement).remote(*arguments)
