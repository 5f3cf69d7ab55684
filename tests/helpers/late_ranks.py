"""Ranks that come late or never to where all of them refuse a run; `helpers.launches` calls them. Not a test module."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from unittest import mock

import torch.distributed as dist

from dualforce import launch
from dualforce.config import ConfigError
from dualforce.train.__main__ import main


def late() -> None:
    """The second rank is still being told of the refusal, and needs the connection, when the first wants to leave."""
    from dualforce.train import agree

    tell = agree._raise_first

    def told(errors: list[str | None]) -> None:
        store = dist.distributed_c10d._get_default_store()
        # Where the first rank does not wait, the store is gone with it, and the question raises.
        while os.environ["RANK"] == "1" and not store.check(["leaving/here/0"]):
            time.sleep(0.05)
        tell(errors)

    with mock.patch.object(agree, "_raise_first", told):
        main()


def dead() -> None:
    """The second rank dies when the ranks have met."""
    seed = launch.seed_everything

    def after_meeting(number: int) -> None:
        if os.environ["RANK"] == "1":
            os._exit(7)
        seed(number)

    with mock.patch.object(launch, "seed_everything", after_meeting), \
         mock.patch.object(launch, "LEAVE_TOGETHER", timedelta(seconds=2)):  # fmt: skip
        main()


def lacking() -> None:
    """The second rank's machine alone lacks a folder."""
    from dualforce.train import setup

    found = setup.sample_codec

    def codec(*args: object) -> object:
        if os.environ["RANK"] == "1":
            raise ConfigError("data.video_codec = /here: no such folder")
        return found(*args)  # type: ignore[arg-type]

    with mock.patch.object(setup, "sample_codec", codec):
        main()


def alone() -> None:
    """The second rank ends while the others build the engine: nobody can know of its reason, so it has to tell."""
    from dualforce.train import setup

    build = setup.build_engine

    def built(*args: object) -> object:
        if os.environ["RANK"] == "1":
            raise ValueError("of this rank alone")
        return build(*args)  # type: ignore[arg-type]

    with mock.patch.object(setup, "build_engine", built), \
         mock.patch.object(launch, "LEAVE_TOGETHER", timedelta(seconds=2)):  # fmt: skip
        main()
