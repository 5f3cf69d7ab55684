"""Who found something: what a stage writes into the samples about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finder:
    """The `tag` of a method, the `version` of the package behind it and the SHA-256 of its `weights`, where it has
    them."""

    tag: str
    version: str | None = None
    weights: str | None = None

    def entry(self) -> dict[str, str]:
        """As JSON, without what it does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}
